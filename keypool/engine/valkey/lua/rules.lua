-- Let a partition know what it needs of a pool's settings, unless it knows later ones.
-- ARGV    1 revision of the pool (registry.py), 2 microseconds that keys rest after each lease, 3 '1' if the pool is
--         being emptied for good, else '', 4 interval and tolerance of its pace in microseconds, with a space between them,
--         '' for none, 5 how many leases that have ended are kept here
-- reply   available, or -1
-- cost    O(1)
--
-- `draining` may be set already by close.lua, in the name of no revision: only a later one opens the partition again.
local known, revision = tonumber(call('HGET', META, 'revision') or -1), tonumber(ARGV[1])
if revision >= known then
  if ARGV[2] == '0' then call('HDEL', META, 'rest') else call('HSET', META, 'rest', ARGV[2]) end
  if ARGV[4] == '' then call('HDEL', META, 'pace') else call('HSET', META, 'pace', ARGV[4]) end
  if ARGV[5] == '0' then call('HDEL', META, 'history') else call('HSET', META, 'history', ARGV[5]) end
  if ARGV[3] ~= '' then
    call('HSET', META, 'draining', 1)
  elseif revision > known then
    call('HDEL', META, 'draining')
  end
  call('HSET', META, 'revision', ARGV[1])
end
return reply_unchanged({})
