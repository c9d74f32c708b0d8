-- Make cooling and quarantined keys available as soon as they have budget, call off quarantines to come, and forget reports.
-- ARGV    1 origin, 2… names
-- reply   available; for each key {1, its row}, {0} if it is unknown, or {-(its latest lease)} if the name has another
--         one
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin, results = ARGV[1], {}

-- Forget reports about a key, and call off a quarantine to come. Returns whether it cools or is quarantined.
local function clear(text, record)
  if record[HISTORY] then record[HISTORY] = false end
  if record[MARK] == COOLING or record[MARK] == QUARANTINED then return true end
  if record[MARK] then record[MARK] = false end
  save(text, record)
  return false
end

for i = 2, #ARGV do
  local record, text, stale = find(ARGV[i])
  if record and not stale then
    local seats, out = {{text, record}}, {}
    if record[SEATS] then
      for _, seat in ipairs(of_seats().others(record)) do
        seats[#seats + 1] = {of_seats().where(seat), seat}
      end
      text = of_seats().where(record)
      seats[1][1] = text
    end
    for _, found in ipairs(seats) do
      if clear(found[1], found[2]) then out[#out + 1] = found end
    end
    if record[SEATS] or #out > 0 then end_exclusion(out, text, record, origin) end
    results[#results + 1] = {1, row_of(text, record)}
  else
    results[#results + 1] = {record and -record[LEASE] or 0}
  end
end
return reply(results)
