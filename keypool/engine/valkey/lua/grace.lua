-- Begin to serve a partition, when a server starts, or after an outage. Keys that were alive at the latest poll and
-- would expire before a certain moment live until then; an expired key is not revived. Repeat the call while the reply
-- says that there is more to do; until then no other script serves the partition.
-- ARGV    1 why: 'start': the partition may be new, and time is given only if it was not polled for a while; 'stop':
--         the partition may be new, and time is given in any case, as no other server serves the pool; 'outage': only
--         if it was not polled for a while; 'rest': the partition is served already, and its other keys get their
--         time, 2 microseconds to the moment, 3 that moment, or 0 in the first call, 4 microseconds ahead: keys that
--         expire later than that are not urgent, 5 keys given time so far, 6 keys to process, 7 microseconds that keys
--         rest after each lease, kept for all scripts from a start on
-- reply   available, or -1; the moment, 0 if the partition was being served; how many keys were processed; 1 if there
--         may be more, else 0
-- cost    O(keys processed * log n)
local why, ends, given, limit = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local seen, since = unpack(call('HMGET', META, 'seen', 'since'))
local may_be_new = why == 'start' or why == 'stop'
if not seen and not may_be_new then
  return redis.error_reply('GONE the pool was emptied, or part of it')
end
call('HDEL', META, '')  -- a first write that needs no memory: Valkey refuses none of the others
if may_be_new then
  if ARGV[7] == '0' then call('HDEL', META, 'rest') else call('HSET', META, 'rest', ARGV[7]) end
end
if why == 'rest' then
  since = string.format('%.0f', NOW)
elseif not since then
  local wanted = ends == 0 and (why == 'stop' or not seen or NOW - seen > AWAY)
  if not wanted then return reply_unchanged({0, 0, 0}) end  -- or another server was faster
  since = seen or '0'
  call('HSET', META, 'since', since)
end
if ends == 0 then ends = NOW + tonumber(ARGV[2]) end
local late = {}
if ends > NOW then
  local upto = string.format('(%.0f', math.min(ends, NOW + tonumber(ARGV[4])))
  late = call('ZRANGEBYSCORE', EXPIRY, '(' .. since, upto, 'LIMIT', 0, limit)
end
for i, text in ipairs(late) do
  local record = record_of(text) or tombstone(text)
  record[EXPIRES] = ends + given + i - 1  -- a microsecond apart, so that the order by expiry has no ties
  save(text, record)
  call('ZADD', EXPIRY, record[EXPIRES], text)
end
local more = #late == limit
if not more and why ~= 'rest' then
  call('HDEL', META, 'since')
  call('HSET', META, 'seen', NOW)
end
return reply_unchanged({ends, #late, more and 1 or 0})
