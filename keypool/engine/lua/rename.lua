-- Name another holder of a lease, if it still holds: whoever acquired it left before hearing of it.
-- ARGV    1 text, 2 lease, 3 owner ('' for none)
-- answer  available, or -1; 1 if it holds
-- cost    O(log n)
local record = live(ARGV[1])
local holds = record and record[5] ~= 0 and string.format('%.0f', record[3]) == ARGV[2]
if holds then
  record[6] = ARGV[3] ~= '' and ARGV[3] or nil
  keep(ARGV[1], record)
end
return answer_as_it_was({holds and 1 or 0})
