-- Read a key.
-- ARGV    1 name, 2 origin if its text is being revealed, which is an event, else ''
-- reply   available, or -1; a row; or a refusal
-- cost    O(log n)
process_due(MAX_DUE)
local record, text, stale = find(ARGV[1])
if not record or stale then return reply_unchanged({refusal(record)}) end
if ARGV[2] ~= '' then
  count('revealed')
  emit('revealed', record, text, record[OWNER], origin_of(ARGV[2]))
end
return reply_unchanged({row_of(text, record)})
