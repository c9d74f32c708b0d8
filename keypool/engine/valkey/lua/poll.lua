-- Sweep a partition, and report its status.
-- ARGV    1 this server, 2 event sequence number up to which it has events (-1: none), 3 microseconds ahead to count
--         expiries in, 4 overdue keys of each kind to process, 5 microseconds that a turn to sweep lasts, 6 number of
--         event counters, 7… names of these counters, and of others
-- reply   available; as in poller.PartitionStatus: available; total; cooling; quarantined; acquires that wait at other
--         servers; keys that expire within that time; microseconds to the next expiry and to the next end of a block
--         or cooldown (-1: there is none; 0: overdue); microseconds that the first expiry and the first such end
--         processed were late (-1: none was); number of the latest id (-1: none); event sequence number; seats beyond the first
--         one of each secret, and those of them that are quarantined; turn: 0 this
--         server sweeps, 1 it stands in, 2 two others do; {value of each counter}; {the latest events that the server
--         doesn't have, oldest first}; how many leases that have ended are kept
-- cost    O(swept * log n), O(64) for events, O(servers with waiters)
--
-- Each deadline is swept by one server, or by a second one if the first has died. META's `sweepers` has these two and
-- the moments at which their turns end; each poll of theirs extends its turn, and the first server to poll takes a
-- free one.
local function first(set, low)
  local found = call('ZRANGEBYSCORE', set, low, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  return found[2] and tonumber(found[2])
end

local function lateness(set, low)
  local deadline = first(set, low)
  return deadline and deadline <= NOW and NOW - deadline or -1
end

local function left(set, low)
  local deadline = first(set, low)
  return deadline and math.max(0, deadline - NOW) or -1
end

local function turn_of(server)
  local kept = call('HGET', META, 'sweepers')
  local one, one_ends, two, two_ends = (kept or '- 0 - 0'):match('(%S+) (%d+) (%S+) (%d+)')
  if tonumber(two_ends) <= NOW then two, two_ends = '-', '0' end
  if tonumber(one_ends) <= NOW then one, one_ends, two, two_ends = two, two_ends, '-', '0' end
  local lasts = tonumber(ARGV[5])
  local ends = string.format('%.0f', NOW + lasts)
  local turn = 2
  if one == server or one == '-' then
    turn = 0
    if tonumber(one_ends) < NOW + 0.7 * lasts then one, one_ends = server, ends end
  elseif two == server or two == '-' then
    turn = 1
    if tonumber(two_ends) < NOW + 0.7 * lasts then two, two_ends = server, ends end
  end
  local new = table.concat({one, one_ends, two, two_ends}, ' ')
  -- pcall, as a poll must reply even if Valkey refuses writes.
  if turn ~= 2 and new ~= kept then redis.pcall('HSET', META, 'sweepers', new) end
  return turn
end

-- Keys that were held when the pool was brought up from layout 3 aren't in HOLDERS: add some of them. With pcall, as a
-- poll must reply even if Valkey refuses writes.
local function index_holders()
  local from = call('HGET', META, 'indexed') or '0'
  if from == '-1' then return end
  local found = call('ZRANGEBYSCORE', STATES, from == '0' and '(0' or from, '+inf', 'WITHSCORES', 'LIMIT', 0, 200)
  for i = 1, #found, 2 do
    local record = record_of(found[i])
    local done = record and is_blocked(record) and redis.pcall('ZADD', HOLDERS, 0, holding_of(record))
    if type(done) == 'table' then return end
  end
  redis.pcall('HSET', META, 'indexed', #found < 400 and '-1' or found[#found])
end

local expiry_lateness, release_lateness = lateness(EXPIRY, '-inf'), lateness(STATES, '(0')
process_due(tonumber(ARGV[4]))
forget_past(MAX_FORGOTTEN)
index_holders()

local waiting = 0
local waiters = call('HGETALL', WAITERS)
for i = 1, #waiters, 2 do
  local count, ends = waiters[i + 1]:match('(%d+) (%d+)')
  if tonumber(ends) < NOW then
    call('HDEL', WAITERS, waiters[i])
  elseif waiters[i] ~= ARGV[1] then
    waiting = waiting + tonumber(count)
  end
end

local counters, event_seq = call('HMGET', META, unpack(ARGV, 7)), 0
for i = 1, #counters do
  counters[i] = tonumber(counters[i] or 0)
  if i <= tonumber(ARGV[6]) then event_seq = event_seq + counters[i] end
end
local known, events = tonumber(ARGV[2]), {}
local new = known < 0 and KEPT_EVENTS or math.min(event_seq - known, KEPT_EVENTS)
if new > 0 then events = call('LRANGE', EVENTS, -new, -1) end

-- Where Valkey evicted records, more seem to cool than stand in the order of deadlines.
local cooling = tonumber(call('HGET', META, 'cooling') or 0)
cooling = math.min(cooling, call('ZCARD', STATES) - available())
local status = reply({
  available(), call('ZCARD', IDS), cooling, call('ZCARD', QUARANTINE), waiting,
  call('ZCOUNT', EXPIRY, '-inf', NOW + tonumber(ARGV[3])),
  left(EXPIRY, '-inf'), left(STATES, '(0'), expiry_lateness, release_lateness,
  tonumber(call('HGET', META, 'id') or -1), event_seq, tonumber(call('HGET', META, 'further') or 0),
  tonumber(call('HGET', META, 'further_quarantined') or 0), turn_of(ARGV[1]), counters, events,
  math.min(call('LLEN', META:sub(1, -5) .. 'ended'), recording),
})
-- pcall, as a poll must reply even if Valkey refuses writes. If only memory is short, the HDEL, which needs none,
-- makes Valkey accept the HSET. A `seen` in the future was written before the clock was set back: hence math.abs.
if math.abs(NOW - call('HGET', META, 'seen')) > 500000 then
  redis.pcall('HDEL', META, '')
  redis.pcall('HSET', META, 'seen', NOW)
end
return status
