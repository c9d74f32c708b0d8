-- For scripts that add keys.

-- Add a key, a new one or one that is moved in.
local function add(text, record)
  save(text, record)
  if record[EXPIRES] ~= NEVER then call('ZADD', EXPIRY, record[EXPIRES], text) end
  call('ZADD', IDS, record[ID], text)
  local entry, name = text, nil
  if record[SEALED] or record[INFO] or record[SEATS] then entry, name = entries_of(text, record) end
  if entry then call('ZADD', TEXTS, 0, entry) end
  if name then call('ZADD', NAMES, 0, name) end
  if record[MARK] == QUARANTINED then
    call('ZADD', QUARANTINE, record[ID], text)
  else
    call('ZADD', STATES, record[RELEASE], text)
  end
  if record[MARK] == COOLING then call('HINCRBY', META, 'cooling', 1) end
  if record[ATTEMPT] then call('ZADD', ATTEMPTS, 0, record[ATTEMPT] .. text) end
  if is_blocked(record) then call('ZADD', HOLDERS, 0, holding_of(record)) end
  if record[SEATS] then of_seats().add(record) end
end

-- The room that is reserved (room.lua) under names other than `name`, those reservations as they are stored, and the room
-- that is reserved under this name.
local function reserved_but(name)
  local sum, others, own = 0, {}, 0
  for held, keys, ends in (call('HGET', META, 'reserved') or ''):gmatch('(%S+) (%d+) (%d+);') do
    if held ~= name and tonumber(ends) > NOW then
      sum = sum + tonumber(keys)
      others[#others + 1] = held .. ' ' .. keys .. ' ' .. ends .. ';'
    elseif held == name and tonumber(ends) > NOW then
      own = tonumber(keys)
    end
  end
  return sum, table.concat(others), own
end

-- The moment of expiry of a key that lives so long from now on, 0 for ever. A microsecond apart by `number`, so that the
-- order by expiry has no ties.
local function expiry_of(life, number)
  return life == 0 and NEVER or NOW + life + number
end

local function reserve(reservations)
  if reservations == '' then call('HDEL', META, 'reserved') else call('HSET', META, 'reserved', reservations) end
end

-- Whether there is room for so many keys, where `most` may be here; they use up what is reserved under this name.
local function take_room(keys, most, name)
  local reserved, others, own = reserved_but(name)
  if keys > 0 and call('ZCARD', IDS) + reserved + keys > tonumber(most) then return false end
  if own > keys then
    reserve(string.format('%s%s %.0f %.0f;', others, name, own - keys, NOW + 10000000))
  elseif own > 0 then
    reserve(others)
  end
  return true
end
