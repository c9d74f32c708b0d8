-- Generate keys, available at once; all, or none if there is no room for them.
-- ARGV    1 microseconds that a key lives, 0 for ever, 2 partitions, 3 this partition, 4 keys that it may hold at most,
--         5 name of the reservation that this uses up ('' for none), 6 origin, 7 '1' if the keys are sealed, 8, 9… for each
--         key: the smallest number for its id, and its text; or, as a sealed text holds only for its id, the number
--         itself, the member, the sealed text and its hint
-- reply   available; for each key its id, none if there is no room; or -1 and the latest number, if one that was given
--         is used already
-- cost    O(keys * log n)
--
-- An id is number * partitions + partition + 1, so it determines the partition. The number grows with every key of the
-- partition, and the caller passes one beyond all that it knows, so ids grow with each of a server's calls.

-- If memory is short, fail here: after a purge, writes would no longer be refused.
call('HINCRBY', META, 'generated', 0)
process_due(MAX_DUE)
local life, partitions, partition = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local sealed = ARGV[7] == '1'
local step = sealed and 4 or 2
local wanted = (#ARGV - 7) / step
local reserved, others = reserved_but(ARGV[5])
if call('ZCARD', IDS) + reserved + wanted > tonumber(ARGV[4]) then return reply({}) end
local origin = ARGV[6]
local number = tonumber(call('HGET', META, 'id') or -1)
if sealed and wanted > 0 and tonumber(ARGV[8]) <= number then return reply({-1, number}) end
if ARGV[5] ~= '' then reserve(others) end
local results = {}
for i = 1, wanted do
  local at = 8 + step * (i - 1)
  local text = ARGV[at + 1]
  number = math.max(number + 1, tonumber(ARGV[at]))
  local id = number * partitions + partition + 1
  local record = {id, NOW, 0, expiry_of(life, i - 1), 0}
  if sealed then record[SEALED], record[HINT] = ARGV[at + 2], ARGV[at + 3] end
  add(text, record)
  emit('generated', record, text, nil, origin)
  results[i] = id
end
call('HSET', META, 'id', number)
call('HINCRBY', META, 'generated', wanted)
freed = freed + wanted
return reply(results)
