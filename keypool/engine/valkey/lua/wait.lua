-- Announce how many acquires wait at a server, so that freed keys are published. If none waits, remove the server, and
-- publish available keys again: the message about them may have gone to this server, which has no use for them.
-- ARGV    1 server, 2 how many wait there, 3 microseconds after which this lapses
-- reply   available
-- cost    O(log n)
process_due(MAX_DUE)
if ARGV[2] == '0' then
  call('HDEL', WAITERS, ARGV[1])
  if freed == 0 then
    local free_here = available()
    if free_here > 0 then publish_freed(free_here) end
  end
else
  local ends = NOW + tonumber(ARGV[3])
  call('HSET', WAITERS, ARGV[1], string.format('%s %.0f', ARGV[2], ends))
  call('PEXPIRE', WAITERS, math.ceil(tonumber(ARGV[3]) / 1000))
end
return reply({})
