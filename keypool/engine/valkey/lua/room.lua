-- Reserve room for keys that a batch is about to generate here, or release it. A batch over several partitions
-- generates keys only once all of them have reserved room, so it generates all or none.
-- ARGV    1 name of the reservation, 2 keys (0: release it), 3 keys that this partition may hold at most,
--         4 microseconds after which a reservation lapses
-- reply   available, or -1; 1 if it is reserved, else 0
-- cost    O(log n + reservations)
if ARGV[2] == '0' then
  local _, others = reserved_but(ARGV[1])
  reserve(others)
  return reply_unchanged({0})
end
process_due(MAX_DUE)
local sum, others = reserved_but(ARGV[1])
local fits = call('ZCARD', IDS) + sum + tonumber(ARGV[2]) <= tonumber(ARGV[3])
if fits then reserve(string.format('%s%s %s %.0f;', others, ARGV[1], ARGV[2], NOW + tonumber(ARGV[4]))) end
return reply_unchanged({fits and 1 or 0})
