-- For scripts that end cooldowns and quarantines.

-- Make the keys of a secret available that cool or are quarantined, each {field, record}, or let them cool until they
-- have budget. The event is that of the key that was named.
local function end_exclusion(out, text, record, origin)
  local release, spent
  if record[SEATS] then
    of_seats().cool(record, 0)
    spent = of_seats().keep_pace(record)
    release = limits_of(record)
  else
    release, spent = with_budget(record, NOW)
  end
  if #out == 0 then return end
  for _, found in ipairs(out) do
    place(found[1], found[2], spent and COOLING, spent and release or 0)
  end
  call('HINCRBY', META, 'restored', 1)
  emit('restored', record, text, record[OWNER], origin)
  if not spent then return end
  if not record[SEATS] then call('HINCRBY', META, 'paced', 1) end
  for _, found in ipairs(out) do
    entered(COOLING, found[1], found[2], nil, origin)
  end
end
