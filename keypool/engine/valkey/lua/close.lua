-- Let a partition serve and take no key any more if it has none.
-- reply   available, or -1; how many keys it has
-- cost    O(log n)
process_due(MAX_DUE)
local total = call('HLEN', RECORDS)
if total == 0 then call('HSET', META, 'draining', 1) end
return reply_unchanged({total})
