-- For scripts about what operators give to keys: names, and other texts.

-- The id of the key with this name, nil if there is none. One that has expired is purged.
local function holder_of(name)
  for _, entry in ipairs(call('ZRANGEBYLEX', NAMES, '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, 2)) do
    local id = entry:match('%z(%d+)$')
    local text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
    local record = text and record_of(text)
    if record and record[EXPIRES] > NOW then return tonumber(id) end
    if record then purge(text, record, 'expired', 'deadline') else call('ZREM', NAMES, entry) end
    if record and record[SEATS] then return holder_of(name) end  -- the next seat has the name now, if there is one
  end
  return nil
end

-- The text before a replacement names the key no longer.
local function end_former(record)
  if record[SEATS] then
    of_seats().end_former(record)
    return
  end
  call('DEL', META:sub(1, -5) .. 'old:' .. record[FORMER])
  record[FORMER] = false
end

-- The id of the key that is leased under this text, which it has no more; nil if there is none.
local function leased_under(member)
  local old = call('GET', META:sub(1, -5) .. 'old:' .. member)
  return old and tonumber(old:match('^%d+'))
end

-- A text that becomes a key's own names no other one, even if that is still leased under it.
local function give_up_former(member)
  local id = leased_under(member)
  local text = id and call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
  local record = text and record_of(text)
  if record and record[FORMER] == member then
    end_former(record)
    save(text, record)
    if record[SEATS] then give_up_former(member) end  -- of the next seat that is leased under it
  end
end
