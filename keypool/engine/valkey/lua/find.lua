-- Look up the texts of ids.
-- ARGV    1… ids
-- reply   available, or -1; for each id the text of its key, nothing (false) if there is none
-- cost    O(ids * log n)
local results = {}
for i, id in ipairs(ARGV) do
  results[i] = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1] or false
end
return reply_unchanged(results)
