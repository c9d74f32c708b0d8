-- Make cooling and quarantined keys available, call off quarantines to come, and forget reports.
-- ARGV    1 origin, 2… names
-- reply   available; for each key {1, its row} or {a refusal}
-- cost    O(keys * log n)
process_due(MAX_DUE)
local origin, results = origin_of(ARGV[1]), {}
for i = 2, #ARGV do
  local record, text, stale = find(ARGV[i])
  if record and not stale then
    record[HISTORY] = nil
    if record[MARK] == COOLING or record[MARK] == QUARANTINED then
      place(text, record, nil, 0)
      count('restored')
      emit('restored', record, text, nil, origin)
    else
      record[MARK] = nil
      save(text, record)
    end
    results[#results + 1] = {1, row_of(text, record)}
  else
    results[#results + 1] = {refusal(record)}
  end
end
return reply(results)
