-- Purge keys.
-- ARGV    1 origin, 2… names
-- reply   available; for each key {its id and text}, or a refusal and ''
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin, results = origin_of(ARGV[1]), {}
for i = 2, #ARGV do
  local record, text, stale = find(ARGV[i])
  if record and not stale then
    purge(text, record, 'deleted', origin)
    results[#results + 1] = {record[ID], text}
  else
    results[#results + 1] = {refusal(record), ''}
  end
end
return reply(results)
