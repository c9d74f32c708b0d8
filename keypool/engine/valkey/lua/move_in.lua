-- Add keys of another pool, as they are; for keypool migrate, while no server serves this one.
-- ARGV    1, 2… for each key: its text, or its member if it is sealed, its attempt, what is SEALED and HINT and INFO and
--         FORMER ('' for nothing), how many seats its secret shall have (0: it has none) and the end of that's cooldown, and
--         its record (common.lua) as MessagePack, without these
-- reply   available
-- cost    O(keys * log n)
local fields = {ATTEMPT, SEALED, HINT, INFO, FORMER}
for i = 1, #ARGV, #fields + 4 do
  local text, record = ARGV[i], cmsgpack.unpack(ARGV[i + #fields + 3])
  for number, field in ipairs(fields) do
    local value = ARGV[i + number]
    if value ~= '' then record[field] = value end
  end
  local wanted, cools = tonumber(ARGV[i + #fields + 1]), tonumber(ARGV[i + #fields + 2])
  if wanted > 0 then
    local first = record_of(text)
    record[SEATS] = first and first[SEATS] or record[ID]
    if not first then of_seats().begin(record) end
    if record[PACED] then
      of_seats().set_paced(record, math.max(of_seats().paced(record) or 0, record[PACED]))
      record[PACED] = false
    end
    if first then text = of_seats().field(text, record[ID]) end
    if cools > 0 then
      of_seats().cool(record, cools)
      of_seats().set_told(record, cools)
    end
  end
  add(text, record)
  if wanted > 0 then of_seats().set_wanted(record, wanted) end
  if record[FORMER] then
    call('SET', META:sub(1, -5) .. 'old:' .. record[FORMER], string.format('%.0f.%.0f', record[ID], record[LEASE]))
  end
end
return reply({})
