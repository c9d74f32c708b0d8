-- Read keys as they are, overdue or not, in order of id; for keypool migrate, while no server serves the pool.
-- ARGV    1 rank of the first, 2 of the last
-- reply   available; {text, attempt or '', record (common.lua) as MessagePack, without the attempt} of each
-- cost    O(log n + keys)
local results = {}
for _, text in ipairs(call('ZRANGE', IDS, ARGV[1], ARGV[2])) do
  local record = record_of(text) or tombstone(text)
  local attempt = record[ATTEMPT] or ''
  if record[ATTEMPT] then record[ATTEMPT] = false end  -- as any 16 bytes: they would be taken for text in MessagePack
  results[#results + 1] = {text, attempt, packed(record)}
end
return reply(results)
