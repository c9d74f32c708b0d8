-- Lease random available keys, each under a new lease number.
-- ARGV    1 bound: how many of the partition's places the caller drew from (0: as many as are available),
--         2 '1' if each key served takes a place away, 3 the highest tick that the caller has seen, 4 moment of
--         the pool's creation, 5 tick at its creation, 6 partitions, 7 this partition, 8 microseconds that a block
--         lasts, 9 what follows of each key wanted: 'owner': an owner ('' for none) and a random number from 0 to 1;
--         'attempt': the same, the microseconds of its block, an attempt, and the name of a token ('' for none)
--         with a zero byte and a reservation (shares.py) behind it if it has one;
--         'repeat': the same, but if the attempt holds leases already, these are the answer to all that it wants, 10,
--         11…
-- reply   available; 1 if overdue keys were in the way, so that a repeat may help, else 0; the
--         highest tick; for each key served, in the order of the owners, what lease_of returns
-- cost    O(keys wanted * log n)
--
-- Rejection sampling: a draw falls on one of `bound` places, of which the first ones stand for the available keys. One
-- that falls on an empty place, or on an expired key, is void. sampler.py proves that every key of the pool then has
-- the same chance.
--
-- A lease number is tick * partitions + partition. Each lease gets a tick that is larger than this partition's last
-- one and every one that the caller knows, and at least the clock's, which advances 10,000 ticks a second. So numbers
-- grow over partitions and servers, as far as the partitions' clocks agree, and none is repeated even if a failover
-- has lost the latest.
process_due(MAX_DUE)
local bound, takes = tonumber(ARGV[1]), ARGV[2] == '1'
local seen, born, base = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local partitions, partition, usual_block = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local step = ARGV[9] == 'owner' and 2 or 5
local last = tonumber(call('HGET', META, 'tick') or 0)
local tick = math.max(last, seen, base + math.floor((NOW - born) / 100))
local free_here = available()
local served, acquired = 0, 0
local held = {}  -- by attempt
local results = {0, 0}

local function draw(chance)
  local rank = math.floor(chance * math.max(bound, free_here))
  if rank >= free_here then return nil end
  local text = call('ZRANGE', STATES, rank, rank)[1]
  local record = record_of(text) or tombstone(text)
  if record[EXPIRES] > NOW then return text, record end
  purge(text, record, 'expired', 'deadline')
  process_due(MAX_DUE)
  free_here = available()
  results[1] = 1
  return nil
end

-- Whether an attempt holds leases from before, which are added to the results, once.
local is_repeated
if ARGV[9] == 'repeat' then
  is_repeated = function(attempt)
    if not held[attempt] then
      held[attempt] = leases_of(attempt)
      for _, lease in ipairs(held[attempt]) do
        results[#results + 1] = lease
      end
    end
    return #held[attempt] > 0
  end
end

for i = 10, #ARGV, step do
  local at = 10 + served * step
  local owner, block, attempt = ARGV[at], usual_block, ''
  if step == 5 then block, attempt = tonumber(ARGV[at + 2]), ARGV[at + 3] end
  if attempt ~= '' and is_repeated and is_repeated(attempt) then
    served = served + 1
  else
    local text, record = draw(tonumber(ARGV[i + 1]))
    if text then
      tick = tick + 1
      record[SERVED] = served_of(record) + 1
      record[LEASE] = tick * partitions + partition
      record[RELEASE] = NOW + block + acquired
      record[OWNER], record[ACQUIRED] = owner ~= '' and owner, NOW
      if record[REPORTED] then record[REPORTED] = false end
      local spent = false
      if interval or record[INFO] then
        local own = pace_of(record)
        if own and record[SEATS] then
          spent = of_seats().charge(record, own)
        elseif own then
          record[PACED] = math.max(record[PACED] or 0, NOW) + own
        end
      end
      if step == 5 and ARGV[at + 4] ~= '' then
        local client, reservation = ARGV[at + 4]:match('^(%Z*)%z?(.*)$')
        record[CLIENT] = client
        if reservation ~= '' then record[SHARE] = reservation end
      end
      if attempt ~= '' then
        record[ATTEMPT] = attempt
        call('ZADD', ATTEMPTS, 0, attempt .. text)
      end
      save(text, record)
      call('ZADD', STATES, record[RELEASE], text)
      call('ZADD', HOLDERS, 0, holding_of(record))
      emit('acquired', record, text, record[OWNER], 'holder')
      acquired = acquired + 1
      served = served + 1
      free_here = free_here - 1
      if spent then
        of_seats().follow(record, false, 'holder')
        free_here = available()
      end
      if takes then bound = bound - 1 end
      results[#results + 1] = lease_of(text, record, false)
    end
  end
end
if acquired > 0 then
  call('HSET', META, 'tick', tick)
  call('HINCRBY', META, 'acquired', acquired)
else
  tick = last
end
results[2] = tick
if free_here == 0 and call('ZCOUNT', STATES, '(0', NOW) > 0 then results[1] = 1 end
return reply(results)
