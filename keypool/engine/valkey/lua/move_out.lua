-- Read keys as they are, overdue or not, in order of id; for keypool migrate, while no server serves the pool.
-- ARGV    1 rank of the first, 2 of the last
-- reply   available; of each its text, or its member if it is sealed, its attempt, what is SEALED and INFO and FORMER (''
--         for nothing), how many seats its secret shall have (0: it has none) and the end of that's cooldown, and its record (common.lua) as MessagePack, without these: for other bytes than UTF-8 would be
--         taken for text there
-- cost    O(log n + keys)
local results = {}
for _, text in ipairs(call('ZRANGE', IDS, ARGV[1], ARGV[2])) do
  local record, found = record_of(text) or tombstone(text), {text}
  for number, field in ipairs({ATTEMPT, SEALED, INFO, FORMER}) do
    found[number + 1] = record[field] or ''
    if record[field] then record[field] = false end
  end
  found[6], found[7] = 0, 0
  if record[SEATS] then
    local cools, surplus = limits_of(record)
    local _, seats = of_seats().number(record)
    found[1], found[6], found[7] = base_of(text, record), seats - surplus, cools
    local paced = of_seats().paced(record)
    if paced then record[PACED] = paced end
    record[SEATS] = false
  end
  found[8] = packed(record)
  results[#results + 1] = found
end
return reply(results)
