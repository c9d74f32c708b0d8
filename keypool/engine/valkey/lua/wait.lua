-- Note how many wait for a key at a server: from now on freed keys are told. None wait: note nothing, and if
-- keys are free, tell another server, since this one may have been told and had no use for them.
-- ARGV    1 server, 2 how many wait there, 3 microseconds that this counts
-- answer  available
-- cost    O(log n)
settle(SETTLED)
if ARGV[2] == '0' then
  call('HDEL', WAITERS, ARGV[1])
  if freed == 0 then
    local free_here = available()
    if free_here > 0 then tell_freed(free_here) end
  end
else
  local ends = NOW + tonumber(ARGV[3])
  call('HSET', WAITERS, ARGV[1], string.format('%s %.0f', ARGV[2], ends))
  call('PEXPIRE', WAITERS, math.ceil(tonumber(ARGV[3]) / 1000))
end
return answer({})
