-- Record that the key with a text is in another partition, as its text was replaced; or remove that. The text then names
-- no key of this partition any more that is leased under it.
-- ARGV    1 the partition ('' to remove), 2 member
-- reply   available, or -1
-- cost    O(log n)
local alias = META:sub(1, -5) .. 'alias:' .. ARGV[2]
if ARGV[1] == '' then
  call('DEL', alias)
else
  give_up_former(ARGV[2])
  call('SET', alias, ARGV[1])
end
return reply_unchanged({})
