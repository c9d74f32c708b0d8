-- For scripts about the names that operators give to keys.

-- The id of the key with this name, nil if there is none. One that has expired is purged.
local function holder_of(name)
  for _, entry in ipairs(call('ZRANGEBYLEX', NAMES, '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, 2)) do
    local id = entry:match('%z(%d+)$')
    local text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
    local record = text and record_of(text)
    if record and record[EXPIRES] > NOW then return tonumber(id) end
    if record then purge(text, record, 'expired', 'deadline') else call('ZREM', NAMES, entry) end
  end
  return nil
end
