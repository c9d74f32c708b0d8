-- Put off the expiry of keys.
-- ARGV    1 microseconds that they live from now, 2… texts
-- answer  available, or -1; for each key its id, 0 if it is unknown
-- cost    O(keys * log n)
settle(SETTLED)
local life = tonumber(ARGV[1])
local said, kept = {}, 0
for i = 2, #ARGV do
  local text = ARGV[i]
  local record = live(text)
  if record then
    record[4] = NOW + life + kept
    keep(text, record)
    call('ZADD', EXPIRY, record[4], text)
    kept = kept + 1
    said[#said + 1] = record[1]
  else
    said[#said + 1] = 0
  end
end
if kept > 0 then call('HINCRBY', META, 'kept_alive', kept) end
return answer_as_it_was(said)
