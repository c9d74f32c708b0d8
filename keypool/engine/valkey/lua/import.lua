-- Add keys from elsewhere, available at once, unless they are there; all of those that aren't, or none if there is no
-- room for them.
-- ARGV    1 microseconds that a key lives, 0 for ever, 2 partitions, 3 this partition, 4 keys that it may hold at most,
--         5 name of a reservation of room ('' for none), of which this call uses what it needs, 6 origin, 7 moment after
--         which nothing is done, as the caller's locks may have lapsed (0 for none), 8 name of the caller's locks (''
--         for none), 9 '1' if some of the texts look like other names, 10, 11… for each key: a number for its id, greater than those before, a name of the key (its member, and
--         behind it the text if the pool may have that in clear), its hint, INFO, '1' if an alias of the member is known
--         to lead nowhere, else '', how many seats it has, and for each seat, whose numbers follow the first one, the
--         sealed text
-- reply   available; for each key {1, its id}, {0, id of the key that has this text, microseconds to its expiry, its
--         state, its INFO, the ids of its seats}, {-1, id of the key that has its name}, {-2, the partition where another script may find it},
--         or {-3} if another server is about to give this text to a key. Or for all of them nothing if there is no room,
--         or {-4} if it is too late, or {-5, the latest number} if a number that was given is used already
-- cost    O(keys * log n)
--
-- With several partitions, the caller knows by locks that no other one has the names (engine/valkey/importing.py).
call('HINCRBY', META, 'generated', 0)  -- if memory is short, fail here
process_due(MAX_DUE)
local life, partitions, partition = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local origin, prefix = ARGV[6], META:sub(1, -5)
if ARGV[7] ~= '0' and NOW > tonumber(ARGV[7]) then return reply({{-4}}) end
local number = tonumber(call('HGET', META, 'id') or -1)
if #ARGV > 9 and tonumber(ARGV[10]) <= number then return reply({{-5, number}}) end

-- What prevents that a key is added, if anything does.
local function obstacle(i, names)
  local member = ARGV[i + 1]:sub(1, DIGEST)
  local record, text = find(ARGV[i + 1])
  if record and record[FORMER] ~= member then
    local ids = record[SEATS] and of_seats().ids(record) or {record[ID]}
    local state = state_of(record)
    return {0, record[ID], record[EXPIRES] - NOW, state, record[INFO] or '', ids}
  end
  if partitions > 1 then
    local lock = call('GET', prefix .. 'lock:' .. member)
    if lock and lock ~= ARGV[8] then return {-3} end
    local alias = ARGV[i + 4] ~= '1' and call('GET', prefix .. 'alias:' .. member)
    if alias then return {-2, tonumber(alias)} end
  end
  local name = ARGV[i + 3] ~= '' and cmsgpack.unpack(ARGV[i + 3])[2]
  if name then
    local holder = names[name] or holder_of(name)
    if holder then return {-1, holder} end
    names[name] = tonumber(ARGV[i]) * partitions + partition + 1
  end
  return nil
end

local results, names, wanted, keys = {}, {}, {}, 0
local i = 10
while i <= #ARGV do
  local found, seats = obstacle(i, names), tonumber(ARGV[i + 5])
  if not found then
    wanted[#wanted + 1] = i
    keys = keys + seats
  end
  results[#results + 1] = found or {1, tonumber(ARGV[i]) * partitions + partition + 1}
  i = i + 6 + seats
end
if not take_room(keys, ARGV[4], ARGV[5]) then return reply({}) end
local nth = 0
for _, i in ipairs(wanted) do
  local member, seats = ARGV[i + 1]:sub(1, DIGEST), tonumber(ARGV[i + 5])
  give_up_former(member)
  if ARGV[i + 4] == '1' then call('DEL', prefix .. 'alias:' .. member) end
  local first = tonumber(ARGV[i]) * partitions + partition + 1
  for seat = 1, seats do
    number = tonumber(ARGV[i]) + seat - 1
    local id, field = number * partitions + partition + 1, member
    local record = {id, NOW, 0, expiry_of(life, nth), 0}
    record[SEALED], record[HINT], record[INFO] = ARGV[i + 5 + seat], ARGV[i + 2], ARGV[i + 3]
    if seats > 1 then
      record[SEATS] = first
      if seat > 1 then field = of_seats().field(member, id) end
    end
    add(field, record)
    emit('imported', record, field, nil, origin)
    nth = nth + 1
  end
end
if keys > 0 then
  call('HSET', META, 'id', number)
  call('HINCRBY', META, 'imported', keys)
  if ARGV[9] == '1' then call('HINCRBY', META, 'odd', 1) end
  freed = freed + keys
end
return reply(results)
