-- Lock words for a while, so that no two servers give the same name or text to keys of two partitions; or unlock them.
-- Only in pools with several partitions.
-- ARGV    1 name of the lock, 2 milliseconds after which it lapses (0: unlock), 3 microseconds for which the caller may go
--         by it, 4… words
-- reply   available, or -1; the moment until which the caller may go by it, by this partition's clock, 0 if somebody
--         else has locked one of the words, so that none was
-- cost    O(words)
local prefix, holder, lasts = META:sub(1, -5) .. 'lock:', ARGV[1], tonumber(ARGV[2])
for i = 4, #ARGV do
  local other = call('GET', prefix .. ARGV[i])
  if lasts > 0 and other and other ~= holder then return reply_unchanged({0}) end
  if lasts == 0 and other == holder then call('DEL', prefix .. ARGV[i]) end
end
if lasts > 0 then
  for i = 4, #ARGV do call('SET', prefix .. ARGV[i], holder, 'PX', lasts) end
end
return reply_unchanged({NOW + tonumber(ARGV[3])})
