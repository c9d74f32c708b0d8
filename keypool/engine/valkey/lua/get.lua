-- Read a key.
-- ARGV    1 name, 2 origin if its text is being revealed, which is an event, else ''
-- reply   available, or -1; {a row, the sealed text, or '', the ids of all seats if there are more}; or 0 if it is
--         unknown, or -(its latest lease) if the name has another one
-- cost    O(log n)
process_due(MAX_DUE)
local record, text, stale = find(ARGV[1])
if not record or stale then return reply_unchanged({record and -record[LEASE] or 0}) end
if ARGV[2] ~= '' then
  call('HINCRBY', META, 'revealed', 1)
  emit('revealed', record, text, record[OWNER], ARGV[2])
end
return reply_unchanged({
  {row_of(text, record), record[SEALED] or '', record[SEATS] and of_seats().ids(record) or {}},
})
