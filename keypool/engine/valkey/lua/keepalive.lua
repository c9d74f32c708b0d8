-- Postpone the expiry of keys.
-- ARGV    1 microseconds that they live from now, 0 for ever, 2… names
-- reply   available, or -1; for each key its id, 0 if it is unknown, or -(its latest lease) if the name has another
--         one, or {'many', how many} if it is a text of several seats
-- cost    O(keys * log n)
process_due(MAX_DUE)
local life = tonumber(ARGV[1])
local results, kept = {}, 0
for i = 2, #ARGV do
  local record, text, stale, by_text = find(ARGV[i])
  local seats
  if record and record[SEATS] and by_text and not stale then record, text, seats = seat_of(record, text, '') end
  if seats then
    results[#results + 1] = {'many', seats}
  elseif record and not stale then
    record[EXPIRES] = life == 0 and NEVER or NOW + life + kept
    save(text, record)
    if life == 0 then call('ZREM', EXPIRY, text) else call('ZADD', EXPIRY, record[EXPIRES], text) end
    kept = kept + 1
    results[#results + 1] = record[ID]
  else
    results[#results + 1] = record and -record[LEASE] or 0
  end
end
if kept > 0 then call('HINCRBY', META, 'kept_alive', kept) end
return reply_unchanged(results)
