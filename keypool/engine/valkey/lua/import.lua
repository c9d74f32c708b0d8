-- Add keys from elsewhere, available at once, unless they are there; all of those that aren't, or none if there is no
-- room for them.
-- ARGV    1 microseconds that a key lives, 0 for ever, 2 partitions, 3 this partition, 4 keys that it may hold at most,
--         5 name of a reservation of room ('' for none), of which this call uses what it needs, 6 origin, 7 moment after
--         which nothing is done, as the caller's locks may have lapsed (0 for none), 8 name of the caller's locks (''
--         for none), 9 '1' if some of the texts look like other names, 10, 11… for each key: a number for its id, greater than the one before, a name of the key (its member, and
--         behind it the text if the pool may have that in clear), the sealed text, its hint, INFO, and '1' if an alias
--         of the member is known to lead nowhere, else ''
-- reply   available; for each key {1, its id}, {0, id of the key that has this text, microseconds to its expiry, its
--         state, its INFO}, {-1, id of the key that has its name}, {-2, the partition where another script may find it},
--         or {-3} if another server is about to give this text to a key. Or for all of them nothing if there is no room,
--         or {-4} if it is too late, or {-5, the latest number} if a number that was given is used already
-- cost    O(keys * log n)
--
-- With several partitions, the caller knows by locks that no other one has the names (engine/valkey/importing.py).
call('HINCRBY', META, 'generated', 0)  -- if memory is short, fail here
process_due(MAX_DUE)
local life, partitions, partition = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local origin, step, prefix = ARGV[6], 6, META:sub(1, -5)
if ARGV[7] ~= '0' and NOW > tonumber(ARGV[7]) then return reply({{-4}}) end
local number = tonumber(call('HGET', META, 'id') or -1)
if #ARGV > 9 and tonumber(ARGV[10]) <= number then return reply({{-5, number}}) end

-- What prevents that a key is added, if anything does.
local function obstacle(i, names)
  local member = ARGV[i + 1]:sub(1, DIGEST)
  local record, text = find(ARGV[i + 1])
  if record and record[FORMER] ~= member then
    return {0, record[ID], record[EXPIRES] - NOW, state_of(record), record[INFO] or ''}
  end
  if partitions > 1 then
    local lock = call('GET', prefix .. 'lock:' .. member)
    if lock and lock ~= ARGV[8] then return {-3} end
    local alias = ARGV[i + 5] ~= '1' and call('GET', prefix .. 'alias:' .. member)
    if alias then return {-2, tonumber(alias)} end
  end
  local name = ARGV[i + 4] ~= '' and cmsgpack.unpack(ARGV[i + 4])[2]
  if name then
    local holder = names[name] or holder_of(name)
    if holder then return {-1, holder} end
    names[name] = tonumber(ARGV[i]) * partitions + partition + 1
  end
  return nil
end

local results, names, wanted = {}, {}, {}
for i = 10, #ARGV, step do
  local found = obstacle(i, names)
  if not found then wanted[#wanted + 1] = i end
  results[#results + 1] = found or {1, tonumber(ARGV[i]) * partitions + partition + 1}
end
local reserved, others, own = reserved_but(ARGV[5])
if #wanted > 0 and call('ZCARD', IDS) + reserved + #wanted > tonumber(ARGV[4]) then return reply({}) end
if own > #wanted then
  reserve(string.format('%s%s %.0f %.0f;', others, ARGV[5], own - #wanted, NOW + 10000000))
elseif own > 0 then
  reserve(others)
end
for nth, i in ipairs(wanted) do
  local member = ARGV[i + 1]:sub(1, DIGEST)
  give_up_former(member)
  if ARGV[i + 5] == '1' then call('DEL', prefix .. 'alias:' .. member) end
  number = tonumber(ARGV[i])
  local record = {number * partitions + partition + 1, NOW, 0, expiry_of(life, nth - 1), 0}
  record[SEALED], record[HINT], record[INFO] = ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  add(member, record)
  emit('imported', record, member, nil, origin)
end
if #wanted > 0 then
  call('HSET', META, 'id', number)
  call('HINCRBY', META, 'imported', #wanted)
  if ARGV[9] == '1' then call('HINCRBY', META, 'odd', 1) end
  freed = freed + #wanted
end
return reply(results)
