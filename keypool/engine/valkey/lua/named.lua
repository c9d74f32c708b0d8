-- For scripts that get names of keys, or reply rows.

local function origin_of(word)
  local by, actor = word:match('^(%a+) ?(.*)$')
  return {by, actor ~= '' and actor}
end

-- Whether a word is the number of the key's latest lease. Compared as texts, since a client's number may exceed what Lua
-- can represent. 0 is not a lease: never served.
local function is_latest(record, lease)
  return lease ~= '0' and lease == string.format('%.0f', record[LEASE])
end

-- The record of a live key, brought up to this moment, its text, and whether the name has a lease that isn't the latest;
-- nil if there is no such key.
local function find(name)
  local text, lease = name, ''
  if name:byte(1) == 255 then
    local id
    id, lease = name:match('^\255(-?%d+)%.?(%d*)$')
    text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
  end
  local record = text and record_of(text)
  if not record then return nil end
  if record[EXPIRES] <= NOW then
    purge(text, record, 'expired', DEADLINE)
    return nil
  end
  catch_up(text, record)
  return record, text, lease ~= '' and not is_latest(record, lease)
end

-- What a change replies about a key that it can't change: 0 if it is unknown, -(latest lease) if another one was named.
local function refusal(record)
  return record and -record[LEASE] or 0
end

-- A key's state at this moment by its deadlines, and the microseconds left of its block or its cooldown.
local function state_of(record)
  local mark, left = record[MARK], record[RELEASE] - NOW
  if mark == QUARANTINED then return 'quarantined', 0 end
  if record[RELEASE] == 0 then return 'available', 0 end
  if left > 0 then return mark == COOLING and 'cooling' or 'blocked', left end
  if mark == PENDING then return 'quarantined', 0 end
  if mark ~= COOLING and left + resting > 0 then return 'cooling', left + resting end
  return 'available', 0
end

-- A row, as pages.py reads it: {text, id, created, lease, owner or '', microseconds to its expiry, state, microseconds
-- left of it (0 if available or quarantined), failures in a row, microseconds since the last one, outcome or '', reason
-- or ''}.
local function row_of(text, record)
  local state, left = state_of(record)
  local history = record[HISTORY] or {0, 0}
  local owner = state == 'blocked' and record[OWNER] or ''
  local reason = state == 'quarantined' and history[5] or history[4] or ''
  return {
    text, record[ID], record[CREATED], record[LEASE], owner, record[EXPIRES] - NOW, state, left, history[1],
    NOW - history[2], history[3] or '', reason,
  }
end
