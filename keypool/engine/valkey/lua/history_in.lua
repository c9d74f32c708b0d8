-- Add leases that have ended, later ones than before; for keypool migrate, while no server serves this pool.
-- ARGV    1, 2, 3… of each the id of its key, its number, and what is kept of it (common.lua)
-- reply   available
-- cost    O(leases * log n)
local place = META:sub(1, -5)
for i = 1, #ARGV, 3 do
  call('ZADD', place .. 'past:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
  call('RPUSH', place .. 'ended', ARGV[i] .. ' ' .. ARGV[i + 1])
end
return reply({})
