-- Make keys, available at once; all, or none if there is no room for them.
-- ARGV    1 microseconds that a key lives, 2 partitions, 3 this partition, 4 keys that it may hold at most,
--         5 name of the reservation that this uses up ('' for none), 6, 7… for each key: the least number that its
--         id may be made of, and its text
-- answer  available; for each key its id, nothing more if there is no room
-- cost    O(keys * log n)
--
-- An id is number * partitions + partition + 1, so it is one of this partition's. The number grows here with
-- every key, and the caller asks for one beyond all that it knows of, so ids grow with each of a server's calls.
call('HINCRBY', META, 'generated', 0)  -- refused for want of memory before a purge could have made it possible
settle(SETTLED)
local life, partitions, partition = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local count = (#ARGV - 5) / 2
local reserved, others = reserved_but(ARGV[5])
if call('ZCARD', EXPIRY) + reserved + count > tonumber(ARGV[4]) then return answer({}) end
if ARGV[5] ~= '' then reserve(others) end
local number = tonumber(call('HGET', META, 'id') or -1)
local said = {}
for i = 1, count do
  local text = ARGV[5 + 2 * i]
  number = math.max(number + 1, tonumber(ARGV[4 + 2 * i]))
  local id = number * partitions + partition + 1
  -- A microsecond apart, so that the order by expiry has no ties.
  local record = {id, NOW, 0, NOW + life + i - 1, 0}
  keep(text, record)
  call('ZADD', STATES, 0, text)
  call('ZADD', EXPIRY, record[4], text)
  call('ZADD', IDS, id, text)
  call('ZADD', TEXTS, 0, text)
  tell('generated', record, text)
  said[i] = id
end
call('HSET', META, 'id', number)
call('HINCRBY', META, 'generated', count)
freed = freed + count
return answer(said)
