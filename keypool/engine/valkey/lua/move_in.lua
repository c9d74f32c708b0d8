-- Add keys of another pool, as they are; for keypool migrate, while no server serves this one.
-- ARGV    for each key seven words: text, id, moment of creation, expiry deadline, release deadline (0: available),
--         lease (0: never served), owner ('' for none)
-- reply   available
-- cost    O(keys * log n)
for i = 1, #ARGV, 7 do
  local record = {tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 5]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])}
  if ARGV[i + 6] ~= '' then record[6] = ARGV[i + 6] end
  add(ARGV[i], record)
end
return reply({})
