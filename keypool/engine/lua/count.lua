-- How many keys can be acquired here.
-- ARGV    none
-- answer  available
-- cost    O(log n)
settle(SETTLED)
return answer({})
