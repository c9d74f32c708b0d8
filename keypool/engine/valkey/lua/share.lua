-- The share of a client that may hold so many leases and no more: a sorted set, reservation by the moment at which its
-- lease ends (shares.py). It is a key of its own, in partitions that hold nothing else.
-- ARGV    1 client, then one of
--         'reserve', leases that it may hold, microseconds after which these reservations lapse, their names
--         'look', leases that it may hold
--         'move', and for each lease its reservation and the microseconds to its end, 0 if it is over
-- reply   available, or -1; of 'reserve' how many were made, the first ones, of 'look' for how many there is room; and
--         microseconds to the earliest end, -1 if no lease is held
-- cost    O(names * log leases held)
local share, act = META:sub(1, -5) .. 'share:' .. ARGV[1], ARGV[2]
if act == 'move' then
  for i = 3, #ARGV, 2 do
    if ARGV[i + 1] == '0' then
      call('ZREM', share, ARGV[i])
    else
      call('ZADD', share, 'XX', string.format('%.0f', NOW + tonumber(ARGV[i + 1])), ARGV[i])
    end
  end
else
  call('ZREMRANGEBYSCORE', share, '-inf', NOW)
end

local function end_of(place)
  local found = call('ZRANGE', share, place, place, 'WITHSCORES')
  return found[2] and tonumber(found[2])
end

local result = 0
if act ~= 'move' then result = tonumber(ARGV[3]) - call('ZCARD', share) end
local first = end_of(0)
if act == 'reserve' then
  result = math.max(0, math.min(result, #ARGV - 4))
  for i = 5, 4 + result do call('ZADD', share, string.format('%.0f', NOW + tonumber(ARGV[4])), ARGV[i]) end
end
local last = act ~= 'look' and end_of(-1)
if last then call('PEXPIREAT', share, math.ceil(last / 1000)) end
return reply_unchanged({result, first and math.max(0, first - NOW) or -1})
