-- Make cooling and quarantined keys available, call off quarantines to come, and forget reports.
-- ARGV    1 origin, 2… names
-- reply   available; for each key {1, its row}, {0} if it is unknown, or {-(its latest lease)} if the name has another
--         one
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin, results = ARGV[1], {}

-- Restore the other seats of a secret. Returns whether one of them was out.
local function restore_others(record)
  local moved = false
  of_seats().cool(record, 0)
  for _, seat in ipairs(of_seats().others(record)) do
    local field = of_seats().where(seat)
    if seat[HISTORY] then seat[HISTORY] = false end
    if seat[MARK] == COOLING or seat[MARK] == QUARANTINED then
      place(field, seat, false, 0)
      moved = true
    else
      if seat[MARK] then seat[MARK] = false end
      save(field, seat)
    end
  end
  return moved
end

for i = 2, #ARGV do
  local record, text, stale = find(ARGV[i])
  if record and not stale then
    local moved = false
    if record[SEATS] then
      moved = restore_others(record)
      text = of_seats().where(record)
    end
    if record[HISTORY] then record[HISTORY] = false end
    if record[MARK] == COOLING or record[MARK] == QUARANTINED then
      place(text, record, false, 0)
      moved = true
    else
      if record[MARK] then record[MARK] = false end
      save(text, record)
    end
    if moved then
      call('HINCRBY', META, 'restored', 1)
      emit('restored', record, text, record[OWNER], origin)
    end
    results[#results + 1] = {1, row_of(text, record)}
  else
    results[#results + 1] = {record and -record[LEASE] or 0}
  end
end
return reply(results)
