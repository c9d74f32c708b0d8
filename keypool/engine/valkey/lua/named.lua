-- For scripts that get names of keys.

local function is_blocked(record)
  return record[RELEASE] ~= 0 and record[MARK] ~= COOLING
end

-- Whether a word is the number of the key's latest lease. Compared as texts, since a client's number may exceed what
-- Lua can represent. 0 is not a lease: never served.
local function is_latest(record, lease)
  return lease ~= '0' and lease == string.format('%.0f', record[LEASE])
end

-- The record of a live key, brought up to this moment, its text, and whether the name has a lease that isn't the
-- latest; nil if there is no such key.
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
    purge(text, record, 'expired', 'deadline')
    return nil
  end
  catch_up(text, record)
  return record, text, lease ~= '' and not is_latest(record, lease)
end
