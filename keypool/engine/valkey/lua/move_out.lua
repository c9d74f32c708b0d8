-- Some keys as they are, overdue or not, in order of id; for keypool migrate, while nobody is served.
-- ARGV    1 rank of the first, 2 of the last
-- answer  available; {text, id, moment of its making, expiry deadline, release deadline (0: available), lease,
--         owner or ''} of each
-- cost    O(log n + keys)
local said = {}
for _, text in ipairs(call('ZRANGE', IDS, ARGV[1], ARGV[2])) do
  local record = record_of(text) or remains(text)
  said[#said + 1] = {text, record[1], record[2], record[4], record[5], record[3], record[6] or ''}
end
return answer(said)
