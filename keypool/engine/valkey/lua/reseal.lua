-- Store keys sealed that were in clear, or sealed under another secrets key.
-- ARGV    1 what META's `rekeyed` is to say, so that a rekey goes on from there after a stop ('' to leave it), 2, 3… for
--         each key: its id, what is stored of the sealed text now ('' for a key in clear): else nothing is done, and its
--         member, sealed text, hint and INFO as they shall be ('' for nothing)
-- reply   available; how many keys were changed
-- cost    O(keys * log n)
call('HINCRBY', META, 'generated', 0)  -- if memory is short, fail here
local changed = 0
for i = 2, #ARGV, 6 do
  local text = call('ZRANGEBYSCORE', IDS, ARGV[i], ARGV[i], 'LIMIT', 0, 1)[1]
  local record = text and record_of(text)
  if record and (record[SEALED] or '') == ARGV[i + 1] then
    local entry, name = entries_of(text, record)
    record[SEALED], record[HINT] = ARGV[i + 3], ARGV[i + 4]
    if ARGV[i + 5] ~= '' then record[INFO] = ARGV[i + 5] end
    local member = ARGV[i + 2]
    if base_of(text, record) ~= text then member = of_seats().field(member, record[ID]) end
    rewrite(text, member, record, entry, name)
    changed = changed + 1
  end
end
if ARGV[1] ~= '' then call('HSET', META, 'rekeyed', ARGV[1]) end
return reply_unchanged({changed})
