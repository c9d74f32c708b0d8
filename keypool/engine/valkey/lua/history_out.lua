-- Read leases that have ended, the oldest first; for keypool migrate, while no server serves the pool.
-- ARGV    1 rank of the first, 2 of the last
-- reply   available; of each the id of its key, and what is kept of it (common.lua), '' if that is missing
-- cost    O(leases * log n)
local place, results = META:sub(1, -5), {}
for _, lease in ipairs(call('LRANGE', place .. 'ended', ARGV[1], ARGV[2])) do
  local id, number = lease:match('(%d+) (%d+)')
  results[#results + 1] = id
  results[#results + 1] = call('ZRANGEBYSCORE', place .. 'past:' .. id, number, number)[1] or ''
end
return reply(results)
