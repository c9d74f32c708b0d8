-- Make cooling and quarantined keys available as soon as they have budget, call off quarantines to come, and forget reports.
-- ARGV    1 origin, 2… names
-- reply   available; for each key {1, its row}, {0} if it is unknown, or {-(its latest lease)} if the name has another
--         one
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin, results = ARGV[1], {}
for i = 2, #ARGV do
  local record, text, stale = find(ARGV[i])
  if record and not stale then
    if record[HISTORY] then record[HISTORY] = false end
    if record[MARK] == COOLING or record[MARK] == QUARANTINED then
      end_exclusion(text, record, origin)
    else
      if record[MARK] then record[MARK] = false end
      save(text, record)
    end
    results[#results + 1] = {1, row_of(text, record)}
  else
    results[#results + 1] = {record and -record[LEASE] or 0}
  end
end
return reply(results)
