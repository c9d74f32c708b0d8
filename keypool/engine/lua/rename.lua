-- Name another holder of a lease, if it still holds: whoever acquired it left before hearing of it.
-- ARGV    1 text, 2 lease, 3 owner ('' for none)
-- answer  available; 1 if it holds
-- cost    O(log n)
local expires, release = live(ARGV[1])
if not expires or release == 0 then return answer({0}) end
local record = record_of(ARGV[1])
if string.format('%.0f', record[3]) ~= ARGV[2] then return answer({0}) end
record[4] = ARGV[3] ~= '' and ARGV[3] or nil
call('HSET', RECORDS, ARGV[1], cmsgpack.pack(record))
return answer({1})
