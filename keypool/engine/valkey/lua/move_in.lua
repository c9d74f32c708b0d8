-- Put keys here that were another pool's, as they are; for keypool migrate, while nobody is served.
-- ARGV    for each key seven words: text, id, moment of its making, expiry deadline, release deadline (0: available),
--         lease (0: never served), owner ('' for none)
-- answer  available
-- cost    O(keys * log n)
for i = 1, #ARGV, 7 do
  local text, id = ARGV[i], tonumber(ARGV[i + 1])
  local record = {id, tonumber(ARGV[i + 2]), tonumber(ARGV[i + 5]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])}
  if ARGV[i + 6] ~= '' then record[6] = ARGV[i + 6] end
  keep(text, record)
  call('ZADD', STATES, ARGV[i + 4], text)
  call('ZADD', EXPIRY, ARGV[i + 3], text)
  call('ZADD', IDS, id, text)
  call('ZADD', TEXTS, 0, text)
end
return answer({})
