-- For scripts that don't act on a pool that is being emptied for good; after attended.lua.
if draining then return redis.error_reply('DRAINING the pool is being deleted') end
