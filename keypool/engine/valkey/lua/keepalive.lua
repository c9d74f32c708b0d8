-- Postpone the expiry of keys.
-- ARGV    1 microseconds that they live from now, 2… texts
-- reply   available, or -1; for each key its id, 0 if it is unknown
-- cost    O(keys * log n)
process_due(MAX_DUE)
local life = tonumber(ARGV[1])
local results, kept = {}, 0
for i = 2, #ARGV do
  local text = ARGV[i]
  local record = live(text)
  if record then
    record[4] = NOW + life + kept
    save(text, record)
    call('ZADD', EXPIRY, record[4], text)
    kept = kept + 1
    results[#results + 1] = record[1]
  else
    results[#results + 1] = 0
  end
end
if kept > 0 then call('HINCRBY', META, 'kept_alive', kept) end
return reply_unchanged(results)
