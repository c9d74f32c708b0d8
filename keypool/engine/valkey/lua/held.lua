-- Look up the leases that an attempt was given and that are still held. They count as given again from now on.
-- ARGV    1 attempt
-- reply   available, or -1; the leases, as in acquire.lua, without order
-- cost    O(log n + leases)
process_due(MAX_DUE)
return reply_unchanged(leases_of(ARGV[1]))
