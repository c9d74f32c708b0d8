-- Read leases of a key that have ended, the latest first.
-- ARGV    1 id of the key, 2 number of a lease: those before it ('' for all), 3 how many at most
-- reply   available, or -1; 1 if there is such a key, else 0; each lease as it is kept (common.lua)
-- cost    O(log n + leases)
process_due(MAX_DUE)
local from = ARGV[2] == '' and '+inf' or '(' .. ARGV[2]
local results = {find('\255' .. ARGV[1]) and 1 or 0}
local leases = call('ZREVRANGEBYSCORE', META:sub(1, -5) .. 'past:' .. ARGV[1], from, '-inf', 'LIMIT', 0, ARGV[3])
for _, past in ipairs(leases) do
  results[#results + 1] = past
end
return reply_unchanged(results)
