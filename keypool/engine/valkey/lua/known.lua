-- Look up which texts and names keys have already.
-- ARGV    1 how many of the following are names of keys, 2, 3… names of keys, then names that operators give
-- reply   available, or -1; for each name of a key {its id, microseconds to its expiry, its state, its INFO, whether the
--         name is the text before a replacement, the ids of its seats}, or {0, the partition that an alias of it leads to, -1 for none}; for
--         each other one the id of the key that has it, 0 if none has
-- cost    O(names * log n)
process_due(MAX_DUE)
local results = {}
for i = 2, #ARGV do
  if i <= tonumber(ARGV[1]) + 1 then
    local record = find(ARGV[i])
    if record then
      local former = record[FORMER] == ARGV[i]:sub(1, DIGEST) and 1 or 0
      local ids = record[SEATS] and of_seats().ids(record) or {record[ID]}
      results[i - 1] = {record[ID], record[EXPIRES] - NOW, state_of(record), record[INFO] or '', former, ids}
    else
      results[i - 1] = {0, tonumber(call('GET', META:sub(1, -5) .. 'alias:' .. ARGV[i]:sub(1, DIGEST)) or -1)}
    end
  else
    results[i - 1] = holder_of(ARGV[i]) or 0
  end
end
return reply_unchanged(results)
