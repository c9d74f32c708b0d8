-- Hold the room that is left in a pool that is nearly full, so that one server at a time fills it; or let go.
-- Asked of partition 0 for the whole pool.
-- ARGV    1 server, 2 microseconds to hold it for (0: let go)
-- answer  available, or -1; 1 if it is this server's now, else 0
-- cost    O(1)
local holder, ends = (call('HGET', META, 'room') or '- 0'):match('(%S+) (%d+)')
if tonumber(ends) > NOW and holder ~= ARGV[1] then return answer_as_it_was({0}) end
if ARGV[2] == '0' then
  call('HDEL', META, 'room')
else
  call('HSET', META, 'room', string.format('%s %.0f', ARGV[1], NOW + tonumber(ARGV[2])))
end
return answer_as_it_was({1})
