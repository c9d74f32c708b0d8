-- How many leases of holders ended by their deadlines lately.
-- ARGV    1… holders, as `holder_of` has them
-- reply   available, or -1; a number for each
-- cost    O(holders)
local results = {}
for i = 1, #ARGV do results[i] = 0 end
local slot = math.floor(NOW / RELEASED_SLOT)
for each = slot - 9, slot do
  local counts = call('HMGET', META:sub(1, -5) .. 'released:' .. each, unpack(ARGV))
  for i = 1, #ARGV do results[i] = results[i] + tonumber(counts[i] or 0) end
end
return reply_unchanged(results)
