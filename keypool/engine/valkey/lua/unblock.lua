-- Free keys, in order.
-- ARGV    1, 2… for each key: its text, and the lease number that it must be held under ('' for any)
-- reply   available; for each key {outcome, id, latest lease}; the outcome is 1 freed, 0 was free already,
--         -1 unknown, -2 the lease isn't the latest
-- cost    O(keys * log n)
process_due(MAX_DUE)
local results = {}
for i = 1, #ARGV, 2 do
  local text, lease = ARGV[i], ARGV[i + 1]
  local record = live(text)
  if not record then
    results[#results + 1] = {-1, 0, 0}
  else
    local outcome = 0
    -- Compared as texts, since a client's number may exceed what Lua can represent. 0 is not a lease: never served.
    if lease == '0' or (lease ~= '' and lease ~= string.format('%.0f', record[3])) then
      outcome = -2
    elseif record[5] ~= 0 then
      free(text, record, 'unblocked')
      outcome = 1
    end
    results[#results + 1] = {outcome, record[1], record[3]}
  end
end
return reply(results)
