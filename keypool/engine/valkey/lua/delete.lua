-- Purge keys, with all their seats.
-- ARGV    1 origin, 2… names
-- reply   available; for each key {its id, its text, and what may be shown of it if that is sealed}, or {0 if it is unknown, else -(its latest lease), as the name has
--         another one; '', ''}
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin, results = ARGV[1], {}
for i = 2, #ARGV do
  local record, text, stale = find(ARGV[i])
  if record and not stale then
    if record[SEATS] then
      local seats = of_seats().all(record)
      for nth = #seats, 1, -1 do
        local field, seat = unpack(seats[nth])
        if seat[EXPIRES] > NOW then catch_up(field, seat) end
        if not seat.is_gone then purge(field, seat, 'deleted', origin) end
      end
      text = base_of(text, record)
    else
      purge(text, record, 'deleted', origin)
    end
    results[#results + 1] = {record[ID], text, record[HINT] or ''}
  else
    results[#results + 1] = {record and -record[LEASE] or 0, '', ''}
  end
end
return reply(results)
