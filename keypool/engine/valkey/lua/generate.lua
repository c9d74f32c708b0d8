-- Generate keys, available at once; all, or none if there is no room for them.
-- ARGV    1 microseconds that a key lives, 2 partitions, 3 this partition, 4 keys that it may hold at most,
--         5 name of the reservation that this uses up ('' for none), 6 origin, 7, 8… for each key: the smallest number
--         for its id, and its text
-- reply   available; for each key its id, none if there is no room
-- cost    O(keys * log n)
--
-- An id is number * partitions + partition + 1, so it determines the partition. The number grows with every key of the
-- partition, and the caller passes one beyond all that it knows, so ids grow with each of a server's calls.

-- If memory is short, fail here: after a purge, writes would no longer be refused.
call('HINCRBY', META, 'generated', 0)
process_due(MAX_DUE)
local life, partitions, partition = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local wanted = (#ARGV - 6) / 2
local reserved, others = reserved_but(ARGV[5])
if call('ZCARD', EXPIRY) + reserved + wanted > tonumber(ARGV[4]) then return reply({}) end
if ARGV[5] ~= '' then reserve(others) end
local origin = ARGV[6]
local number = tonumber(call('HGET', META, 'id') or -1)
local results = {}
for i = 1, wanted do
  local text = ARGV[6 + 2 * i]
  number = math.max(number + 1, tonumber(ARGV[5 + 2 * i]))
  local id = number * partitions + partition + 1
  -- A microsecond apart, so that the order by expiry has no ties.
  local record = {id, NOW, 0, NOW + life + i - 1, 0}
  add(text, record)
  emit('generated', record, text, nil, origin)
  results[i] = id
end
call('HSET', META, 'id', number)
call('HINCRBY', META, 'generated', wanted)
freed = freed + wanted
return reply(results)
