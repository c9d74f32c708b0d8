-- For scripts that get names of keys.

-- Whether a word is the number of the key's latest lease. Compared as texts, since a client's number may exceed what
-- Lua can represent. 0 is not a lease: never served.
local function is_latest(record, lease)
  return lease ~= '0' and lease == string.format('%.0f', record[LEASE])
end

-- The record of a live key, brought up to this moment, its text, and whether the name has a lease that isn't the
-- latest, and whether it is named by its text; nil if there is no such key. A text of several seats names the first.
local function find(name)
  local text, lease, first, record, is_old = name, '', name:byte(1), nil, false
  local by_text = true
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
    by_text = is_old
    local id
    id, lease = text:match('^\255(-?%d+)%.?(%d*)$')
    text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
  end
  record = record or text and record_of(text)
  if not record then return nil end
  if text == name and base_of(text, record) ~= text then return nil end  -- a field, but no text
  if record[EXPIRES] <= NOW then
    purge(text, record, 'expired', 'deadline')
    if record[SEATS] and by_text then return find(name) end
    if #name > DIGEST and name:byte(1) == MEMBER then return find(name:sub(DIGEST + 1)) end
    return nil
  end
  if record[SEATS] and record[RELEASE] ~= 0 and record[RELEASE] <= NOW and of_seats().settle(record) then
    return find(name)
  end
  catch_up(text, record)
  if record.is_gone then
    if by_text then return find(name) end
    return nil
  end
  if is_old and not (is_blocked(record) and is_latest(record, lease)) then
    if record[SEATS] and call('GET', META:sub(1, -5) .. 'old:' .. name:sub(1, DIGEST)) ~= is_old then return find(name) end
    return find(name:sub(DIGEST + 1))
  end
  return record, text, not is_old and lease ~= '' and not is_latest(record, lease), by_text
end

-- The seat that is meant by whoever names its secret by the text: the one with this lease ('' for any, if there is only
-- one), as `find` returns it; or nil, nil, how many there are, and the latest lease of them.
local function seat_of(record, text, lease)
  local living, latest = {}, 0
  for _, found in ipairs(of_seats().all(record)) do
    local seat = found[2]
    if seat[EXPIRES] > NOW then
      living[#living + 1] = found
      latest = math.max(latest, seat[LEASE])
    end
  end
  if #living <= 1 then return record, text end
  for _, found in ipairs(living) do
    local field, seat = found[1], found[2]
    if lease ~= '' and is_latest(seat, lease) then
      catch_up(field, seat)
      if not seat.is_gone then return seat, field end
    end
  end
  return nil, nil, #living, latest
end
