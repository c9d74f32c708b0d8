-- Begin to serve a partition: at a server's start, and when it is in reach again after an outage. Keys that would be
-- dead by a moment live until then, if they were alive when a server last looked; an expired key is not revived.
-- Call again while the answer says that there is more to do; no other script serves the partition meanwhile.
-- ARGV    1 '1' at a start: the partition may be new, 2 '1' if no other server serves the pool: the time is given
--         whenever one last looked, 3 microseconds to the moment, 4 that moment, or 0 for the first call,
--         5 keys given so far, 6 keys to deal with
-- answer  available, or -1; the moment, 0 if the partition is being served; how many keys were dealt with; 1 if
--         there may be more, else 0
-- cost    O(keys dealt with * log n)
local seen, since = unpack(call('HMGET', META, 'seen', 'since'))
if not seen and ARGV[1] ~= '1' then
  return redis.error_reply('GONE the pool was emptied, or part of it')
end
local ends, given, limit = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
call('HDEL', META, '')  -- a first write that needs no memory: Valkey refuses none of the others
if not since then
  local wanted = ends == 0 and (ARGV[2] == '1' or not seen or NOW - seen > AWAY)
  if not wanted then return answer_as_it_was({0, 0, 0}) end  -- or another server was faster
  since = seen or '0'
  call('HSET', META, 'since', since)
end
if ends == 0 then ends = NOW + tonumber(ARGV[3]) end
local late = {}
if ends > NOW then
  late = call('ZRANGEBYSCORE', EXPIRY, '(' .. since, string.format('(%.0f', ends), 'LIMIT', 0, limit)
end
for i, text in ipairs(late) do
  local record = record_of(text)
  record[4] = ends + given + i - 1  -- a microsecond apart, so that the order by expiry has no ties
  keep(text, record)
  call('ZADD', EXPIRY, record[4], text)
end
local more = #late == limit
if not more then
  call('HDEL', META, 'since')
  call('HSET', META, 'seen', NOW)
end
return answer_as_it_was({ends, #late, more and 1 or 0})
