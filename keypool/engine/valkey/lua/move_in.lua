-- Add keys of another pool, as they are; for keypool migrate, while no server serves this one.
-- ARGV    1, 2, 3… for each key: its text, its attempt ('' for none), and its record (common.lua) as MessagePack,
--         without the attempt
-- reply   available
-- cost    O(keys * log n)
for i = 1, #ARGV, 3 do
  local record = cmsgpack.unpack(ARGV[i + 2])
  if ARGV[i + 1] ~= '' then record[ATTEMPT] = ARGV[i + 1] end
  add(ARGV[i], record)
end
return reply({})
