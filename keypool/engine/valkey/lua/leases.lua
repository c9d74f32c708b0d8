-- For scripts that reply leases.

-- A lease: {text, id, lease, microseconds to its expiry, to its release}. Behind these, if any of it says something: 1
-- if its attempt had it before, else 0, INFO, and 1 if the text is sealed, which stands in its place, else 0.
local function lease_of(text, record, is_repeated)
  local lease = {text, record[ID], record[LEASE], record[EXPIRES] - NOW, record[RELEASE] - NOW}
  if record[INFO] or record[SEALED] or record[SEATS] then
    lease[1] = record[SEALED] or base_of(text, record)
    lease[6], lease[7], lease[8] = is_repeated and 1 or 0, record[INFO] or '', record[SEALED] and 1 or 0
  elseif is_repeated then
    lease[6] = 1
  end
  return lease
end

-- The leases that an attempt was given and that are still held. They count as given again from now on.
local function leases_of(attempt)
  local leases = {}
  for _, member in ipairs(call('ZRANGEBYLEX', ATTEMPTS, '[' .. attempt, '(' .. attempt .. '\255')) do
    local text = member:sub(#attempt + 1)
    local record = record_of(text)
    if record and record[ATTEMPT] == attempt and record[EXPIRES] > NOW and record[RELEASE] > NOW then
      if not record[REPLAYED] then
        record[REPLAYED] = true
        save(text, record)
      end
      leases[#leases + 1] = lease_of(text, record, true)
    end
  end
  return leases
end
