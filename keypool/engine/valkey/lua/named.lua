-- For scripts that get names of keys.

-- Whether a word is the number of the key's latest lease. Compared as texts, since a client's number may exceed what
-- Lua can represent. 0 is not a lease: never served.
local function is_latest(record, lease)
  return lease ~= '0' and lease == string.format('%.0f', record[LEASE])
end

-- The record of a live key, brought up to this moment, its text, and whether the name has a lease that isn't the
-- latest; nil if there is no such key.
local function find(name)
  local text, lease, first, record, is_old = name, '', name:byte(1), nil, false
  if first == MEMBER then
    text = name:sub(1, DIGEST)
    record = record_of(text)
    if not record then
      -- No key has this member: it may be a text that was replaced, which its holder may still use, or the clear text,
      -- or another name.
      local old = call('GET', META:sub(1, -5) .. 'old:' .. text)
      text, is_old = old and '\255' .. old or name:sub(DIGEST + 1), old
      first = text:byte(1)
    end
  end
  if first == 255 then
    local id
    id, lease = text:match('^\255(-?%d+)%.?(%d*)$')
    text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
  end
  record = record or text and record_of(text)
  if not record then return nil end
  if record[EXPIRES] <= NOW then
    purge(text, record, 'expired', 'deadline')
    if #name > DIGEST and name:byte(1) == MEMBER then return find(name:sub(DIGEST + 1)) end
    return nil
  end
  catch_up(text, record)
  if is_old and not (is_blocked(record) and is_latest(record, lease)) then return find(name:sub(DIGEST + 1)) end
  return record, text, lease ~= '' and not is_latest(record, lease)
end
