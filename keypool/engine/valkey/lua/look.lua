-- Sweep, and tell how the partition stands.
-- ARGV    1 this server, 2 events that it has heard of (-1: of none), 3 microseconds ahead to count expiries in,
--         4 overdue keys to deal with, of each kind, 5 microseconds that a turn to sweep lasts
-- answer  available; total; acquires that wait at other servers; keys that expire within that time;
--         microseconds to the next expiry and to the next release (-1: there is none; 0: overdue);
--         microseconds that the first expiry and the first release dealt with were late (-1: none was);
--         generated, acquired, unblocked, released, deleted, expired, kept_alive, refused, revealed;
--         the number of the latest id (-1: none); events that have been; whether it is this server's turn to sweep
--         here: 0 it sweeps, 1 it stands in, 2 two others do; the latest of those events that it hasn't heard of,
--         oldest first
-- cost    O(swept * log n), O(64) for events, O(servers with waiters)
--
-- A deadline needs one server to sweep it, and another one in case that dies. META's `sweepers` has these two and
-- until when their turns last; each look prolongs its server's, and whichever server comes first takes a free one.
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
  local keeps = table.concat({one, one_ends, two, two_ends}, ' ')
  -- A look answers also where it may not write.
  if turn ~= 2 and keeps ~= kept then redis.pcall('HSET', META, 'sweepers', keeps) end
  return turn
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
said[#said + 1] = turn_of(ARGV[1])
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
