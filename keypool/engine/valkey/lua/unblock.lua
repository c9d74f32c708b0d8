-- End leases, and take the reports of their holders, in order.
-- ARGV    1 origin of keys without a lease number, 2 '' if there are no reports, else MessagePack: {cooldown, longest
--         cooldown, longest retry_after, failures in a row from which an error cools, after how long they are forgotten,
--         percentage of secrets that reports may quarantine, secrets quarantined in other partitions, secrets in other
--         partitions}, lengths in microseconds, 3, 4, 5, 6… for each key: its name, the lease number that it must be
--         held under ('' for any), a report: MessagePack {outcome, retry_after in seconds or nil, reason or nil}, or ''
--         for none, or '-' if the lease did not reach its caller and is to end unless its attempt was given it again;
--         and how often the key was used, that of the acquire among them
-- reply   available; for each key {outcome, id, latest lease, state, microseconds to the end of its cooldown, 1 if the
--         guard turned a quarantine into a cooldown, its text (or what may be shown of a sealed one)
--         if the name isn't}; the outcome is 1 changed, 0 not, -1
--         unknown, -2 the lease isn't the latest, -7 it is a text of so many (id) seats
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin  -- of the key that is processed: whoever has its lease number is its holder
local conclude

-- Charge a key for what its lease used beside the acquire. Returns whether it has a pace.
local function charge(record, uses)
  if uses == '1' then return false end
  local own, ahead = pace_of(record)
  if not own then return false end
  local before = record[PACED]
  if record[SEATS] then before = of_seats().paced(record) end
  local paced = math.min((before or NOW) + (tonumber(uses) - 1) * own, NOW + ahead + LONGEST_WAIT)
  if record[SEATS] then
    of_seats().set_paced(record, paced)
    of_seats().keep_pace(record)
  else
    record[PACED] = paced
  end
  return true
end

if ARGV[2] ~= '' then
  local cooldown, longest, longest_retry, threshold, forget, percent, quarantined_elsewhere, elsewhere =
    unpack(cmsgpack.unpack(ARGV[2]))

  local function cooldown_of(outcome, retry_after, failures)
    if outcome == 'rate_limited' and retry_after then
      return math.floor(math.min(retry_after * 1e6, longest_retry) + 0.5)
    end
    if outcome == 'error' and failures < threshold then return 0 end
    return math.floor(math.min(cooldown * 2 ^ math.min(failures - 1, 64), longest) + 0.5)
  end

  local function may_quarantine()
    local further, further_quarantined = unpack(call('HMGET', META, 'further', 'further_quarantined'))
    further = tonumber(further or 0)
    local quarantined = call('ZCARD', QUARANTINE) - tonumber(further_quarantined or 0) + quarantined_elsewhere
    return quarantined == 0 or (quarantined + 1) * 100 <= percent * (call('ZCARD', IDS) - further + elsewhere)
  end

  -- Let an available or cooling key cool at least until then, and if it was charged until it has budget.
  local function cool_longer(text, record, release, charged)
    local mark, ends, spent = record[MARK], record[MARK] == COOLING and record[RELEASE] or NOW, false
    release = math.max(release, ends)
    if charged and record[SEATS] then
      release = math.max(release, (limits_of(record)))
    elseif charged then
      release, spent = with_budget(record, release)
    end
    if release == ends then
      save(text, record)
      return
    end
    place(text, record, COOLING, release)
    if spent then call('HINCRBY', META, 'paced', 1) end
    if mark ~= COOLING then entered(COOLING, text, record, nil, origin) end
  end

  -- Add a report to a lease that has ended, if it is kept.
  local function amend_past(record, outcome, reason)
    local leases, lease = META:sub(1, -5) .. 'past:' .. string.format('%.0f', record[ID]), record[LEASE]
    local number = string.format('%.0f', lease)
    local found = call('ZRANGEBYSCORE', leases, number, number)[1]
    if not found then return end
    local past = cmsgpack.unpack(found)
    past[7], past[8] = outcome, reason or false
    call('ZREM', leases, found)
    call('ZADD', leases, number, cmsgpack.pack(past))
  end

  -- Apply a report. Returns whether the guard turned a quarantine into a cooldown.
  conclude = function(text, record, uses, outcome, retry_after, reason)
    local history, mark = record[HISTORY] or {0, 0}, record[MARK]
    local invalid = outcome == 'invalid'
    local quarantine = invalid and (mark == PENDING or mark == QUARANTINED or may_quarantine())
    local failures, failed_at, cools = NOW < history[2] + forget and history[1] or 0, history[2], 0
    if outcome == 'ok' then
      failures = 0
    elseif not quarantine then
      failures, failed_at = failures + 1, NOW
      cools = cooldown_of(outcome, retry_after, failures)
    end
    record[HISTORY] = {failures, failed_at, outcome, reason or history[5] and false, history[5] or nil}
    record[REPORTED] = true
    local leaving = quarantine or mark == PENDING or mark == QUARANTINED
    local charged = charge(record, uses)
    if record[SEATS] and cools > 0 and not leaving then of_seats().cool(record, NOW + cools) end
    if is_blocked(record) then
      if quarantine then record[MARK] = PENDING end
      free(text, record, 'unblocked', NOW, origin, NOW + cools, outcome, reason)
    else
      if quarantine and mark ~= QUARANTINED then
        place(text, record, QUARANTINED, 0)
        entered(QUARANTINED, text, record, nil, origin)
      elseif mark == QUARANTINED then
        save(text, record)
      else
        cool_longer(text, record, NOW + cools, charged)
      end
      if recording > 0 then amend_past(record, outcome, reason) end
    end
    if record[SEATS] then of_seats().follow(record, leaving, origin) end
    return invalid and not quarantine
  end
end

local results = {}
for i = 3, #ARGV, 4 do
  local name, lease, report, uses = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local record, text, stale, by_text = find(name)
  local seats, latest
  if record and record[SEATS] and by_text and not stale then record, text, seats, latest = seat_of(record, text, lease) end
  if seats then
    results[#results + 1] = {lease == '' and -7 or -2, seats, latest}
  elseif not record then
    results[#results + 1] = {-1, 0, 0}
  elseif stale or lease ~= '' and not is_latest(record, lease) then
    results[#results + 1] = {-2, record[ID], record[LEASE]}
  else
    origin = lease == '' and ARGV[1] or 'holder'
    local outcome, guarded = 0, false
    if report ~= '' and report ~= '-' then
      if not record[REPORTED] then
        outcome, guarded = 1, conclude(text, record, uses, unpack(cmsgpack.unpack(report), 1, 3))
      end
    elseif is_blocked(record) and not (report == '-' and record[REPLAYED]) then
      local charged = charge(record, uses)
      free(text, record, 'unblocked', NOW, origin, 0)
      if charged and record[SEATS] then of_seats().follow(record, false, origin) end
      outcome = 1
    end
    local state, left = state_of(record)
    if state ~= 'cooling' then left = 0 end
    results[#results + 1] = {
      outcome, record[ID], record[LEASE], state, left, guarded and 1 or 0, text ~= name and (record[HINT] or base_of(text, record)) or '',
    }
  end
end
return reply(results)
