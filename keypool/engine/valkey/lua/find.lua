-- Look up the texts of ids, and their places in order of text.
-- ARGV    1… ids
-- reply   available, or -1; for each id {text, what TEXTS has of it}, nothing (false) if there is no such key
-- cost    O(ids * log n)
local results = {}
for i, id in ipairs(ARGV) do
  local text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
  results[i] = text and {text, (entries_of(text, record_of(text) or {})) or ''} or false
end
return reply_unchanged(results)
