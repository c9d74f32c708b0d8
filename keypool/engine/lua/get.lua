-- How a key stands.
-- ARGV    1 text, 2 '1' if its text is being shown to somebody, which is an event
-- answer  available; {id, created, lease, owner or '', microseconds to expiry, to release (0: available)};
--         nothing more than available if it is unknown
-- cost    O(log n)
settle(SETTLED)
local text = ARGV[1]
local expires, release = live(text)
if not expires then return answer({}) end
local record = record_of(text)
if ARGV[2] == '1' then
  call('HINCRBY', META, 'revealed', 1)
  tell('revealed', record, text, record[4])
end
local left = release ~= 0 and release - NOW or 0
return answer({{record[1], record[2], record[3], record[4] or '', expires - NOW, left}})
