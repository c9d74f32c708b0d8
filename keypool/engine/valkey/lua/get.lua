-- Read a key.
-- ARGV    1 text, 2 '1' if its text is being revealed, which is an event
-- reply   available, or -1; {id, created, lease, owner or '', microseconds to expiry, to release (0: available)};
--         or no row, if it is unknown
-- cost    O(log n)
process_due(MAX_DUE)
local text = ARGV[1]
local record = live(text)
if not record then return reply_unchanged({}) end
if ARGV[2] == '1' then
  call('HINCRBY', META, 'revealed', 1)
  emit('revealed', record, text, record[6])
end
local left = record[5] ~= 0 and record[5] - NOW or 0
return reply_unchanged({{record[1], record[2], record[3], record[6] or '', record[4] - NOW, left}})
