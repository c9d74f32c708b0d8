-- Change the registry of the pools (registry.py), in which `default` is only if it was given settings. Used without
-- common.lua, as it concerns no partition.
-- KEYS    1 hash: the facts of the pool `default` (engine.py), whose number is 0, with `pools_version`, which grows with
--         each change, and `pools_last`, the number of the latest pool; 2 hash: the pools, name -> entry
-- ARGV    1 moment of creation of the pool `default`, 2 name, 3 the entry that is there ('' for none), 4 the fields of
--         the new entry that follow number and revision, as MessagePack ('' to remove it; born 0: this moment), 5 how
--         many pools there may be beside `default`
-- reply   outcome: 1 changed, 0 another entry is there, -1 there are as many pools as there may be, -2 the pool
--         `default` is gone; the entry that is there now, '' for none
-- cost    O(1)
--
-- An entry is an array of MessagePack: its first fields are the number of the pool, which no other one ever has, and
-- the revision, the `pools_version` of its latest change.
if redis.replicate_commands then redis.replicate_commands() end
local call = redis.call
if call('HGET', KEYS[1], 'born') ~= ARGV[1] then return {-2, ''} end
local found = call('HGET', KEYS[2], ARGV[2]) or ''
if found ~= ARGV[3] then return {0, found} end
if ARGV[4] == '' then
  call('HDEL', KEYS[2], ARGV[2])
  call('HINCRBY', KEYS[1], 'pools_version', 1)
  return {1, ''}
end
if found == '' and ARGV[2] ~= 'default' then
  local others = call('HLEN', KEYS[2]) - call('HEXISTS', KEYS[2], 'default')
  if others >= tonumber(ARGV[5]) then return {-1, ''} end
end
local revision = call('HINCRBY', KEYS[1], 'pools_version', 1)
local number = 0
if found ~= '' then
  number = cmsgpack.unpack(found)[1]
elseif ARGV[2] ~= 'default' then
  number = call('HINCRBY', KEYS[1], 'pools_last', 1)
end
local partitions, born, base_tick, base_id, draining, actor, settings = unpack(cmsgpack.unpack(ARGV[4]))
if born == 0 then
  local clock = call('TIME')
  born = clock[1] * 1000000 + clock[2]
end
local entry = cmsgpack.pack({
  number, revision, partitions, born, base_tick, base_id, draining, actor, settings,
})
call('HSET', KEYS[2], ARGV[2], entry)
return {1, entry}
