-- Count acquires that were refused because no key was available.
-- ARGV    1 how many
-- reply   available, or -1; refused so far, as counted in this partition
-- cost    O(log n)
return reply_unchanged({call('HINCRBY', META, 'refused', ARGV[1])})
