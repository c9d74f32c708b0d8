-- Serve random available keys, each under a new lease number.
-- ARGV    1 how many available keys the caller thought were here, 2 the highest tick that it has seen,
--         3 moment of the pool's birth, 4 tick at its birth, 5 partitions, 6 this partition,
--         7 microseconds that a block lasts, 8 seed, 9, 10… for each key wanted: its owner ('' for none) and a
--         random number from 0 to 1
-- answer  available; 1 if a crowd of overdue keys stood in the way and asking again may help, else 0; the highest
--         tick; for each key wanted: nothing (false), or {text, id, lease, microseconds to its expiry}
-- cost    O(keys wanted * log n)
--
-- The caller chose this partition with the chance (available here, as it thought) / (available in all), and a
-- draw that falls beyond what is really here is void. So every key of the pool has the same chance, as long as
-- nobody thought too little of a partition.
--
-- A lease number is tick * partitions + partition. The tick of this partition grows by one at least, beyond
-- every tick that the caller knows of, and with the clock, 10,000 a second: so numbers grow over partitions and
-- servers, and none comes twice even if a failover has lost the latest of them.
settle(SETTLED)
local expected, seen, born, base = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local partitions, partition, block = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local last = tonumber(call('HGET', META, 'tick') or 0)
local tick = math.max(last, seen, base + math.floor((NOW - born) / 100))
local free_here = available()
local tries = 2 * SETTLED
local served = 0
local said = {0, 0}
math.randomseed(tonumber(ARGV[8]))

local function draw(chance)
  local rank
  if free_here <= expected then
    rank = math.floor(chance * expected)
    if rank >= free_here then return nil end
  else
    rank = math.floor(chance * free_here)
  end
  while free_here > 0 and tries > 0 do
    local text = call('ZRANGE', STATES, rank, rank)[1]
    local record = record_of(text)
    if record[4] > NOW then return text, record end
    purge(text, record, 'expired')
    free_here = free_here - 1
    tries = tries - 1
    if free_here > 0 then rank = math.random(0, free_here - 1) end
  end
  return nil
end

for i = 9, #ARGV, 2 do
  local text, record = draw(tonumber(ARGV[i + 1]))
  if text then
    local owner = ARGV[i] ~= '' and ARGV[i] or nil
    tick = tick + 1
    record[3] = tick * partitions + partition
    record[5] = NOW + block + served
    record[6] = owner
    keep(text, record)
    call('ZADD', STATES, record[5], text)
    tell('acquired', record, text, owner)
    served = served + 1
    free_here = free_here - 1
    expected = expected - 1
    said[#said + 1] = {text, record[1], record[3], record[4] - NOW}
  else
    said[#said + 1] = false
  end
end
if served > 0 then
  call('HSET', META, 'tick', tick)
  call('HINCRBY', META, 'acquired', served)
else
  tick = last
end
said[2] = tick
if tries == 0 or (free_here == 0 and call('ZCOUNT', STATES, '(0', NOW) > 0) then said[1] = 1 end
return answer(said)
