-- Read keys as they are, overdue or not, in order of id; for keypool migrate, while no server serves the pool.
-- ARGV    1 rank of the first, 2 of the last
-- reply   available; {text, record (common.lua) as MessagePack} of each
-- cost    O(log n + keys)
local results = {}
for _, text in ipairs(call('ZRANGE', IDS, ARGV[1], ARGV[2])) do
  results[#results + 1] = {text, packed(record_of(text) or tombstone(text))}
end
return reply(results)
