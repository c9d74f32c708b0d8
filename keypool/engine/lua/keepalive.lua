-- Put off the expiry of keys.
-- ARGV    1 microseconds that they live from now, 2… texts
-- answer  available; for each key its id, 0 if it is unknown
-- cost    O(keys * log n)
settle(SETTLED)
local life = tonumber(ARGV[1])
local said, kept = {}, 0
for i = 2, #ARGV do
  local text = ARGV[i]
  if live(text) then
    call('ZADD', EXPIRY, NOW + life + kept, text)
    kept = kept + 1
    said[#said + 1] = record_of(text)[1]
  else
    said[#said + 1] = 0
  end
end
if kept > 0 then call('HINCRBY', META, 'kept_alive', kept) end
return answer(said)
