-- Bring a pool of an older layout up to layout 4, unless servers of the older version serve it. Used without common.lua,
-- as it concerns the pool and not a partition.
-- KEYS    1 hash: the pool's facts (engine.py), 2 sorted set: servers by the moment of their latest heartbeat
-- ARGV    1 microseconds without a heartbeat after which a server is gone, 2 a secret for handles
-- reply   number of servers that prevent it; the moment of their latest heartbeat, 0 for none
-- cost    O(log servers)
--
-- Layout 2 adds fields to records and keys to partitions, layout 3 the registry of pools and more of the same, layout 4
-- paces, the history, holders, rare events, seats, and `default` in the registry. So what the older ones have is right as
-- it is, but for HOLDERS, which polls complete (poll.lua). The moment of creation is moved by a microsecond: to a server
-- of the older version that comes back or starts just now, it is another pool, which it doesn't serve.
if redis.replicate_commands then redis.replicate_commands() end
local call = redis.call
local layout = call('HGET', KEYS[1], 'layout')
if layout ~= '1' and layout ~= '2' and layout ~= '3' then return {0, 0} end
local clock = call('TIME')
local now, away = clock[1] * 1000000 + clock[2], tonumber(ARGV[1])
local from, to = string.format('%.0f', now - away), string.format('%.0f', now + away)
local last = call('ZREVRANGEBYSCORE', KEYS[2], to, from, 'WITHSCORES', 'LIMIT', 0, 1)
if last[2] then return {call('ZCOUNT', KEYS[2], from, to), tonumber(last[2])} end
call('HSETNX', KEYS[1], 'secret', ARGV[2])
call('HINCRBY', KEYS[1], 'born', 1)
call('HSET', KEYS[1], 'layout', 4)
return {0, 0}
