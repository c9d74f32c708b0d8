-- Add keys of another pool, as they are; for keypool migrate, while no server serves this one.
-- ARGV    1, 2… for each key: its text, and its record (common.lua) as MessagePack
-- reply   available
-- cost    O(keys * log n)
for i = 1, #ARGV, 2 do
  add(ARGV[i], cmsgpack.unpack(ARGV[i + 1]))
end
return reply({})
