-- Give a secret more or fewer seats.
-- ARGV    1 name, 2 what is stored of the sealed text ('' for none): nothing is done if it is another one by now, 3 how
--         many seats there shall be, 4 microseconds that a key lives, 0 for ever, 5 partitions, 6 this partition, 7 keys
--         that it may hold at most, 8 name of a reservation of room ('' for none), of which this call uses what it needs, 9 origin, 10, 11…
--         for each seat that is added: a number for its id, greater than the one before, and its sealed text ('' for none)
-- reply   available; {1, the row of the key, or of the first seat if the key is one that went}, {0} if the key is unknown,
--         {-(its latest lease)} if the name has another one, {'changed'} if it was changed meanwhile or other seats are to
--         be added, {'full'} if there is no room, or {'number', the latest number} if a number is used already
-- cost    O(seats * log n)
call('HINCRBY', META, 'generated', 0)  -- if memory is short, fail here
process_due(MAX_DUE)
local wanted, life = tonumber(ARGV[3]), tonumber(ARGV[4])
local partitions, partition, origin = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[9]

-- Add a seat beside this one, and let it be where the others are.
local function add_seat(text, record, id, sealed, nth)
  local field = of_seats().field(base_of(text, record), id)
  local seat = {id, NOW, 0, expiry_of(life, nth), 0}
  seat[SEALED], seat[HINT], seat[INFO] = sealed ~= '' and sealed, record[HINT], record[INFO]
  seat[SEATS], seat[HISTORY] = record[SEATS], record[HISTORY]
  add(field, seat)
  local imported = record[INFO] and cmsgpack.unpack(record[INFO])[1] and 'imported' or 'generated'
  call('HINCRBY', META, imported, 1)
  emit(imported, seat, field, nil, origin)
  local cools = limits_of(record)
  if record[MARK] == QUARANTINED or record[MARK] == PENDING then
    place(field, seat, QUARANTINED, 0)
    entered(QUARANTINED, field, seat, nil, origin)
  elseif cools > NOW then
    place(field, seat, COOLING, cools)
    entered(COOLING, field, seat, nil, origin)
  else
    freed = freed + 1
  end
end

local function change(name)
  local record, text, stale = find(name)
  if not record or stale then return {record and -record[LEASE] or 0} end
  if (record[SEALED] or '') ~= ARGV[2] then return {'changed'} end
  local seats = {{text, record}}
  if record[SEATS] then
    for _, found in ipairs(of_seats().all(record)) do
      if found[2][EXPIRES] <= NOW then purge(of_seats().where(found[2]), found[2], 'expired', 'deadline') end
    end
    record, text = find(name)
    if not record then return {0} end
    seats = of_seats().all(record)
  end
  local more = wanted - #seats
  if (#ARGV - 9) / 2 ~= math.max(0, more) then return {'changed'} end
  if more > 0 then
    local number = tonumber(call('HGET', META, 'id') or -1)
    if tonumber(ARGV[10]) <= number then return {'number', number} end
    if not take_room(more, ARGV[7], ARGV[8]) then return {'full'} end
  end
  if not record[SEATS] then
    if wanted == 1 then return {1, row_of(text, record)} end
    record[SEATS] = record[ID]
    -- A cooldown may be a rest, which others needn't wait for; but none may be shortened.
    local paced = record[PACED]
    if paced then record[PACED] = false end
    of_seats().add(record)
    save(text, record)
    if paced then of_seats().set_paced(record, paced) end
    if is_blocked(record) then of_seats().keep_pace(record) end  -- an available one has budget
    if record[MARK] == COOLING then
      of_seats().cool(record, record[RELEASE])
      of_seats().is_first(COOLING, record)
    end
  end
  for nth = 1, math.max(0, more) do
    local number = tonumber(ARGV[8 + 2 * nth])
    add_seat(text, record, number * partitions + partition + 1, ARGV[9 + 2 * nth], nth - 1)
    call('HSET', META, 'id', number)
  end
  of_seats().set_wanted(record, wanted)
  for nth = #seats, 1, -1 do
    local _, surplus = limits_of(record)
    -- The first one may have taken the place of another.
    local field = call('ZRANGEBYSCORE', IDS, seats[nth][2][ID], seats[nth][2][ID], 'LIMIT', 0, 1)[1]
    local seat = field and record_of(field)
    if seat and surplus > 0 and not is_blocked(seat) then
      purge(field, seat, 'deleted', origin)
      if seat[ID] == record[ID] then record.is_gone = true end
    end
  end
  if record.is_gone then
    text, record = unpack(of_seats().all(record)[1])
  elseif wanted < #seats then
    text = call('ZRANGEBYSCORE', IDS, record[ID], record[ID], 'LIMIT', 0, 1)[1]
  end
  return {1, row_of(text, record)}
end

return reply(change(ARGV[1]))
