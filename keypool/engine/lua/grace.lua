-- At the start of a server, if no other one serves the pool: keys that would be dead by a moment live until then.
-- ARGV    1 microseconds without a look after which no server lives, 2 that moment, or 0 for the first time,
--         3 microseconds to that moment, 4 keys to deal with
-- answer  available, or -1; that moment, 0 if a server lives; how many keys were dealt with
-- cost    O(keys dealt with * log n)
local seen = tonumber(call('HGET', META, 'seen') or 0)
if NOW - seen <= tonumber(ARGV[1]) then return answer_as_it_was({0, 0}) end
local ends = tonumber(ARGV[2])
if ends == 0 then ends = NOW + tonumber(ARGV[3]) end
local late = call('ZRANGEBYSCORE', EXPIRY, '-inf', string.format('(%.0f', ends), 'LIMIT', 0, ARGV[4])
for i, text in ipairs(late) do
  local record = record_of(text) or remains(text)
  record[4] = ends + i - 1
  keep(text, record)
  call('ZADD', EXPIRY, record[4], text)
end
return answer_as_it_was({ends, #late})
