-- The texts of ids.
-- ARGV    1… ids
-- answer  available, or -1; for each id the text of its key, nothing (false) if there is none
-- cost    O(ids * log n)
local said = {}
for i, id in ipairs(ARGV) do
  said[i] = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1] or false
end
return answer_as_it_was(said)
