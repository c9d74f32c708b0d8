-- Reserve room for keys that a batch is going to make here, or give it up again. A batch that needs room in
-- several partitions makes keys only when all have reserved it: so it makes all or none.
-- ARGV    1 name of the reservation, 2 keys (0: give it up), 3 keys that this partition may hold at most,
--         4 microseconds after which a reservation lapses
-- answer  available, or -1; 1 if it is reserved, else 0
-- cost    O(log n + reservations)
if ARGV[2] == '0' then
  local _, others = reserved_but(ARGV[1])
  reserve(others)
  return answer_as_it_was({0})
end
settle(SETTLED)
local sum, others = reserved_but(ARGV[1])
local fits = call('ZCARD', EXPIRY) + sum + tonumber(ARGV[2]) <= tonumber(ARGV[3])
if fits then reserve(string.format('%s%s %s %.0f;', others, ARGV[1], ARGV[2], NOW + tonumber(ARGV[4]))) end
return answer_as_it_was({fits and 1 or 0})
