-- Purge keys for ever.
-- ARGV    1… texts
-- answer  available; for each key its id, 0 if it is unknown
-- cost    O(keys * log n)
settle(SETTLED)
local said = {}
for i, text in ipairs(ARGV) do
  local record = live(text)
  if record then purge(text, record, 'deleted') end
  said[i] = record and record[1] or 0
end
return answer(said)
