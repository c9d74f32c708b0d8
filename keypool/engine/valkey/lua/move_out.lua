-- Read keys as they are, overdue or not, in order of id; for keypool migrate, while no server serves the pool.
-- ARGV    1 rank of the first, 2 of the last
-- reply   available; {text, id, moment of creation, expiry deadline, release deadline (0: available), lease,
--         owner or ''} of each
-- cost    O(log n + keys)
local results = {}
for _, text in ipairs(call('ZRANGE', IDS, ARGV[1], ARGV[2])) do
  local record = record_of(text) or tombstone(text)
  results[#results + 1] = {text, record[1], record[2], record[4], record[5], record[3], record[6] or ''}
end
return reply(results)
