-- Change a key's details, or give it another text.
-- ARGV    1 name, 2 what is stored of the sealed text, 3 and of INFO ('' for nothing): the change was made from these, so
--         nothing is done if they are others by now, 4 the member, and behind it the text if
--         the pool may have that in clear (or only the text of a key that stays in clear), 5 the sealed text, 6 its
--         hint and 7 INFO as they shall be ('' for nothing), 8 'replace' for another text: a cooldown or quarantine is
--         over then, else '', 9 origin, 10 member of the text before ('' if it stays the same), 11 moment after which
--         nothing is done, as the caller's locks may have lapsed (0 for none), 12 '1' if the text looks like another name, 13,
--         14… if it has seats, for each of the others its id, and its sealed text as ARGV 5
-- reply   available; {1, its row}, {0} if the key is unknown, {-(its latest lease)} if the name has another one,
--         {'changed'} if it was changed meanwhile, {'late'}, or {'name' or 'text', the id of the key that has it}
-- cost    O(log n)
call('HINCRBY', META, 'generated', 0)  -- if memory is short, fail here
process_due(MAX_DUE)

-- Whether an id is that of a key, or of a seat beside it.
local function is_same(record, id)
  if id == record[ID] then return true end
  if not record[SEATS] then return false end
  for _, each in ipairs(of_seats().ids(record)) do
    if each == id then return true end
  end
  return false
end

-- Change a key, or one seat of it, which gets another field. Returns whether a cooldown or quarantine of it is over.
local function change_one(text, to, record, sealed, member)
  local info = ARGV[7]
  local entry, named = entries_of(text, record)
  if sealed ~= '' then record[SEALED], record[HINT] = sealed, ARGV[6] end
  if info ~= '' then record[INFO] = info elseif record[INFO] then record[INFO] = false end
  if ARGV[10] ~= '' then
    if record[PACED] then record[PACED] = false end
    local former = is_blocked(record) and (record[FORMER] or ARGV[10])
    if record[FORMER] then
      save(text, record)
      end_former(record)
    end
    if former and former ~= member then
      record[FORMER] = former
      call('SET', META:sub(1, -5) .. 'old:' .. former, string.format('%.0f.%.0f', record[ID], record[LEASE]))
    end
  end
  if ARGV[8] == 'replace' and record[HISTORY] then record[HISTORY] = false end
  local over = ARGV[8] == 'replace' and record[MARK]
  if over == PENDING then record[MARK] = false end
  rewrite(text, to, record, entry, named)
  return over == COOLING or over == QUARANTINED
end

local function change(name)
  local member, info = ARGV[4], ARGV[7]
  if member:byte(1) == MEMBER then member = member:sub(1, DIGEST) end
  local record, text, stale = find(name)
  if not record or stale then return {record and -record[LEASE] or 0} end
  if (record[SEALED] or '') ~= ARGV[2] or (record[INFO] or '') ~= ARGV[3] then return {'changed'} end
  if ARGV[11] ~= '0' and NOW > tonumber(ARGV[11]) then return {'late'} end
  local wanted = info ~= '' and cmsgpack.unpack(info)[2]
  local holder = wanted and holder_of(wanted)
  if holder and not is_same(record, holder) then return {'name', holder} end
  local other = member ~= base_of(text, record) and find(ARGV[4])
  if other and not is_same(record, other[ID]) and other[FORMER] ~= member then return {'text', other[ID]} end
  local sealed = {[record[ID]] = ARGV[5]}
  for i = 13, #ARGV, 2 do sealed[tonumber(ARGV[i])] = ARGV[i + 1] end
  local seats = record[SEATS] and of_seats().all(record) or {{text, record}}
  if record[SEATS] then  -- unless the caller knows them all, it has to try again
    local known = 0
    for _ in pairs(sealed) do known = known + 1 end
    for _, found in ipairs(seats) do
      if not sealed[found[2][ID]] then return {'changed'} end
    end
    if known ~= #seats then return {'changed'} end
  end
  local before = ARGV[10] ~= '' and leased_under(member)
  if before and not is_same(record, before) then give_up_former(member) end
  if ARGV[12] == '1' then call('HINCRBY', META, 'odd', 1) end
  local out, id = {}, record[ID]
  -- The first one last, as the others are found by its place.
  for nth = #seats, 1, -1 do
    local field, seat = seats[nth][1], record_of(seats[nth][1])
    local to = member
    if field ~= base_of(field, seat) then to = of_seats().field(member, seat[ID]) end
    if change_one(field, to, seat, sealed[seat[ID]], member) then out[#out + 1] = {to, seat} end
    if seat[ID] == id then text, record = to, seat end
  end
  if record[SEATS] and ARGV[10] ~= '' then of_seats().set_paced(record, false) end
  if ARGV[8] == 'replace' and (record[SEATS] or #out > 0) then end_exclusion(out, text, record, ARGV[9]) end
  return {1, row_of(text, record)}
end

return reply(change(ARGV[1]))
