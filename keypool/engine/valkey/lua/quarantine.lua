-- Take keys out of service: at once if nobody holds them, else when their leases end, or at once all the same.
-- ARGV    1 origin, 2 reason ('' for none), 3 '1' for at once, 4… names
-- reply   available; for each key {1, its row}, {0} if it is unknown, or {-(its latest lease)} if the name has another
--         one
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin, reason, at_once = ARGV[1], ARGV[2], ARGV[3] == '1'

local function quarantine(text, record)
  if reason ~= '' then
    local history = record[HISTORY] or {0, 0}
    record[HISTORY] = {history[1], history[2], history[3] or false, history[4] or false, reason}
  end
  record[REPORTED] = record[REPORTED] or at_once
  if is_blocked(record) then
    record[MARK] = PENDING
    if at_once then free(text, record, 'unblocked', NOW, origin, 0) else save(text, record) end
  elseif record[MARK] == QUARANTINED then
    save(text, record)
  else
    place(text, record, QUARANTINED, 0)
    entered(QUARANTINED, text, record, nil, origin)
  end
end

local results = {}
for i = 4, #ARGV do
  local record, text, stale = find(ARGV[i])
  if record and not stale then
    local others = record[SEATS] and of_seats().others(record) or {}
    quarantine(record[SEATS] and of_seats().where(record) or text, record)
    for _, seat in ipairs(others) do quarantine(of_seats().where(seat), seat) end
    if record.is_gone then
      text, record = unpack(of_seats().all(record)[1])
    elseif record[SEATS] then
      text = of_seats().where(record)
    end
    results[#results + 1] = {1, row_of(text, record)}
  else
    results[#results + 1] = {record and -record[LEASE] or 0}
  end
end
return reply(results)
