-- Purge keys for ever.
-- ARGV    1… texts
-- answer  available; for each key its id, 0 if it is unknown
-- cost    O(keys * log n)
settle(SETTLED)
local said = {}
for i, text in ipairs(ARGV) do
  said[i] = live(text) and purge(text, 'deleted')[1] or 0
end
return answer(said)
