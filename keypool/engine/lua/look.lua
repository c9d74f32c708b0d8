-- Sweep, and tell how the partition stands.
-- ARGV    1 this server, 2 events that it has heard of (-1: of none), 3 microseconds ahead to count expiries in,
--         4 overdue keys to deal with, of each kind
-- answer  available; total; acquires that wait at other servers; keys that expire within that time;
--         microseconds to the next expiry and to the next release (-1: there is none; 0: overdue);
--         microseconds that the first expiry and the first release dealt with were late (-1: none was);
--         generated, acquired, unblocked, released, deleted, expired, kept_alive, refused, revealed;
--         the number of the latest id (-1: none); events that have been; the latest of those that it hasn't heard of, oldest first
-- cost    O(swept * log n), O(64) for events, O(servers with waiters)
local function first(set, low)
  local found = call('ZRANGEBYSCORE', set, low, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  return found[2] and tonumber(found[2])
end

local function late(set, low)
  local deadline = first(set, low)
  return deadline and deadline <= NOW and NOW - deadline or -1
end

local function left(set, low)
  local deadline = first(set, low)
  return deadline and math.max(0, deadline - NOW) or -1
end

local late_expiry, late_release = late(EXPIRY, '-inf'), late(STATES, '(0')
settle(tonumber(ARGV[4]))

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

local said = {
  call('ZCARD', EXPIRY), waiting, call('ZCOUNT', EXPIRY, '-inf', NOW + tonumber(ARGV[3])),
  left(EXPIRY, '-inf'), left(STATES, '(0'), late_expiry, late_release,
}
local counters = call('HMGET', META, 'generated', 'acquired', 'unblocked', 'released', 'deleted', 'expired',
  'kept_alive', 'refused', 'revealed')
local told = 0
for i = 1, 9 do
  local count = tonumber(counters[i] or 0)
  said[#said + 1] = count
  if i ~= 7 and i ~= 8 then told = told + count end
end
said[#said + 1] = tonumber(call('HGET', META, 'id') or -1)
said[#said + 1] = told
local heard = tonumber(ARGV[2])
local news = heard < 0 and KEPT_EVENTS or math.min(told - heard, KEPT_EVENTS)
if news > 0 then
  for _, event in ipairs(call('LRANGE', EVENTS, -news, -1)) do
    said[#said + 1] = event
  end
end
-- It may tell how the partition stands also where it may not write. Where memory is short, it may: a first write that
-- needs none makes Valkey refuse no other. A moment in the future was noted before the clock was set back.
if math.abs(NOW - call('HGET', META, 'seen')) > 500000 then
  redis.pcall('HDEL', META, '')
  redis.pcall('HSET', META, 'seen', NOW)
end
return answer(said)
