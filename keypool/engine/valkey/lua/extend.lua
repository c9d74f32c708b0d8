-- Let leases end later.
-- ARGV    1 microseconds that a lease lasts at most, 2 those of a usual block, 3, 4, 5… for each key: its name, the
--         lease number, microseconds from now at which it is to end ('' for those of 2)
-- reply   available, or -1; for each key {outcome, id, latest lease, microseconds to its release, microseconds to the
--         latest moment to which it could be extended, its attempt or ''}; the outcome is 1 extended, -1 unknown, -2
--         the lease isn't the latest, -3 it is over, -4 it ends in a quarantine, -5 it would not end later, -6 it
--         would, but for the longest that it may last
-- cost    O(keys * log n)
process_due(MAX_DUE)
local longest, block = tonumber(ARGV[1]), tonumber(ARGV[2])

local function extend(record, text, lease, seconds)
  if not is_latest(record, lease) then return -2, 0 end
  if record[MARK] == PENDING then return -4, 0 end
  if not is_blocked(record) then return -3, 0 end
  local last = (record[ACQUIRED] or record[RELEASE] - block) + longest
  local release = math.min(NOW + seconds, last)
  if release <= record[RELEASE] then return last <= record[RELEASE] and -6 or -5, last end
  record[RELEASE] = release
  record[EXTENDED] = (record[EXTENDED] or 0) + 1
  save(text, record)
  call('ZADD', STATES, release, text)
  if record[SHARE] then share_moved(record, release - NOW) end
  return 1, last
end

local results = {}
for i = 3, #ARGV, 3 do
  local record, text, stale, by_text = find(ARGV[i])
  local seats, latest
  if record and record[SEATS] and by_text and not stale then
    record, text, seats, latest = seat_of(record, text, ARGV[i + 1])
  end
  if seats then
    results[#results + 1] = {-2, 0, latest, 0, 0, ''}
  elseif record then
    local outcome, last = -2, 0
    if not stale then outcome, last = extend(record, text, ARGV[i + 1], tonumber(ARGV[i + 2]) or block) end
    results[#results + 1] = {
      outcome, record[ID], record[LEASE], record[RELEASE] - NOW, last - NOW, record[ATTEMPT] or '',
    }
  else
    results[#results + 1] = {-1, 0, 0, 0, 0, ''}
  end
end
return reply_unchanged(results)
