-- For scripts that look up attempts.

-- The leases that an attempt was given and that are still held: {text, id, lease, microseconds to its expiry, to its
-- release, 1} of each. They count as given again from now on.
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
      leases[#leases + 1] = {text, record[ID], record[LEASE], record[EXPIRES] - NOW, record[RELEASE] - NOW, 1}
    end
  end
  return leases
end
