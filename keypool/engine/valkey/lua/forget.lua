-- Forget leases of a pool that is gone, with all other leases of their keys.
-- ARGV    1 how many at most
-- reply   available, or -1; how many are left
-- cost    O(leases)
local place = META:sub(1, -5)
for _, lease in ipairs(call('LPOP', place .. 'ended', ARGV[1]) or {}) do
  call('UNLINK', place .. 'past:' .. lease:match('%d+'))
end
return reply_unchanged({call('LLEN', place .. 'ended')})
