-- Change a key's details, or give it another text.
-- ARGV    1 name, 2 what is stored of the sealed text, 3 and of INFO ('' for nothing): the change was made from these, so
--         nothing is done if they are others by now, 4 the member, and behind it the text if
--         the pool may have that in clear (or only the text of a key that stays in clear), 5 the sealed text, 6 its
--         hint and 7 INFO as they shall be ('' for nothing), 8 'replace' for another text: a cooldown or quarantine is
--         over then, else '', 9 origin, 10 member of the text before ('' if it stays the same), 11 moment after which
--         nothing is done, as the caller's locks may have lapsed (0 for none), 12 '1' if the text looks like another name
-- reply   available; {1, its row}, {0} if the key is unknown, {-(its latest lease)} if the name has another one,
--         {'changed'} if it was changed meanwhile, {'late'}, or {'name' or 'text', the id of the key that has it}
-- cost    O(log n)
call('HINCRBY', META, 'generated', 0)  -- if memory is short, fail here
process_due(MAX_DUE)

local function change(name)
  local member, info = ARGV[4], ARGV[7]
  if member:byte(1) == MEMBER then member = member:sub(1, DIGEST) end
  local record, text, stale = find(name)
  if not record or stale then return {record and -record[LEASE] or 0} end
  if (record[SEALED] or '') ~= ARGV[2] or (record[INFO] or '') ~= ARGV[3] then return {'changed'} end
  if ARGV[11] ~= '0' and NOW > tonumber(ARGV[11]) then return {'late'} end
  local wanted = info ~= '' and cmsgpack.unpack(info)[2]
  local holder = wanted and holder_of(wanted)
  if holder and holder ~= record[ID] then return {'name', holder} end
  local other = member ~= text and find(ARGV[4])
  if other and other[ID] ~= record[ID] and other[FORMER] ~= member then return {'text', other[ID]} end
  local entry, named = entries_of(text, record)
  if ARGV[5] ~= '' then record[SEALED], record[HINT] = ARGV[5], ARGV[6] end
  if info ~= '' then record[INFO] = info elseif record[INFO] then record[INFO] = false end
  if ARGV[10] ~= '' then
    if record[PACED] then record[PACED] = false end
    give_up_former(member)
    local former = is_blocked(record) and (record[FORMER] or ARGV[10])
    if record[FORMER] then end_former(record) end
    if former and former ~= member then
      record[FORMER] = former
      call('SET', META:sub(1, -5) .. 'old:' .. former, string.format('%.0f.%.0f', record[ID], record[LEASE]))
    end
  end
  if ARGV[12] == '1' then call('HINCRBY', META, 'odd', 1) end
  if ARGV[8] == 'replace' and record[HISTORY] then record[HISTORY] = false end
  local over = ARGV[8] == 'replace' and record[MARK]
  if over == PENDING then record[MARK] = false end
  rewrite(text, member, record, entry, named)
  if over == COOLING or over == QUARANTINED then
    end_exclusion(member, record, ARGV[9])
  end
  return {1, row_of(member, record)}
end

return reply(change(ARGV[1]))
