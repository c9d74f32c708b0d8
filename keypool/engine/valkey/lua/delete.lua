-- Purge keys.
-- ARGV    1… texts
-- reply   available; for each key its id, 0 if it is unknown
-- cost    O(keys * log n)
process_due(MAX_DUE)
local results = {}
for i, text in ipairs(ARGV) do
  local record = live(text)
  if record then purge(text, record, 'deleted') end
  results[i] = record and record[1] or 0
end
return reply(results)
