-- Acquires were answered that no key is available: count them.
-- ARGV    1 how many
-- answer  available, or -1; refused so far, as counted in this partition
-- cost    O(log n)
return answer_as_it_was({call('HINCRBY', META, 'refused', ARGV[1])})
