-- A server begins to serve the pool, or sends a heartbeat. Used without common.lua, as it concerns the pool and not a
-- partition.
-- KEYS    1 hash: the pool's facts (engine.py), 2 sorted set: servers by the moment of their latest heartbeat
-- ARGV    1 server, 2 moment of the pool's creation, 3 microseconds without a heartbeat after which a server is gone,
--         4… at a start: the settings that servers share, name and value
-- reply   this moment; the moment of creation of the pool that is there ('' for none); version of the registry of pools
--         (pools.lua); number of other servers; the moment of their latest heartbeat, 0 for none; name and value of a setting that differs, '' and '' for none
-- cost    O(log servers)
--
-- The stored settings are those of the running servers. If there is no other server, this one's are stored. A server
-- whose settings differ isn't added.
if redis.replicate_commands then redis.replicate_commands() end
local call = redis.call
local clock = call('TIME')
local now, away = clock[1] * 1000000 + clock[2], tonumber(ARGV[3])
local born = call('HGET', KEYS[1], 'born') or ''
local version = tonumber(call('HGET', KEYS[1], 'pools_version') or 0)
if born ~= ARGV[2] then return {now, born, version, 0, 0, '', ''} end
-- The first write needs no memory, so Valkey refuses none of the others. Moments in the future were written
-- before the clock was set back.
call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - away))
call('ZREMRANGEBYSCORE', KEYS[2], string.format('%.0f', now + away), '+inf')
local others, latest = call('ZCARD', KEYS[2]), 0
if call('ZSCORE', KEYS[2], ARGV[1]) then others = others - 1 end
local last = call('ZREVRANGE', KEYS[2], 0, 1, 'WITHSCORES')
for i = 1, #last, 2 do
  if last[i] ~= ARGV[1] then latest = math.max(latest, tonumber(last[i + 1])) end
end
for i = 4, #ARGV, 2 do
  local value = call('HGET', KEYS[1], ARGV[i])
  if others > 0 and value and value ~= ARGV[i + 1] then return {now, born, version, others, latest, ARGV[i], value} end
end
for i = 4, #ARGV, 2 do call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
call('ZADD', KEYS[2], now, ARGV[1])
return {now, born, version, others, latest, '', ''}
