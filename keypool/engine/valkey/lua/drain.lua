-- Purge a slice of a partition that is being emptied for good: keys that nobody holds, or all.
-- ARGV    1 origin, 2 '1' for held keys, too, 3 the id after which to go on, 4 how many keys to look at
-- reply   available; how many keys are left; the id up to which keys were looked at, -1 if that were all; how many
--         keys cool
-- cost    O(slice * log n)
--
-- Keys become free behind the id: so those that are available or quarantined are purged wherever they are.
process_due(MAX_DUE)
local origin, held_too, limit = ARGV[1], ARGV[2] == '1', tonumber(ARGV[4])

-- Backwards, so that the place of a first seat doesn't go to the next one each time.
local function purge_some(texts)
  for i = #texts, 1, -1 do
    local text, record = find_again(texts[i])
    local held = record and record[RELEASE] > NOW and record[MARK] ~= COOLING
    if record and (held_too or not held) then purge(text, record, 'deleted', origin) end
  end
end

local texts, last = call('ZRANGEBYSCORE', IDS, '(' .. ARGV[3], '+inf', 'LIMIT', 0, limit), -1
if #texts == limit then last = tonumber(call('ZSCORE', IDS, texts[limit])) end
purge_some(texts)
purge_some(call('ZRANGEBYSCORE', STATES, 0, 0, 'LIMIT', 0, limit))
purge_some(call('ZRANGE', QUARANTINE, 0, limit - 1))
return reply({call('HLEN', RECORDS), last, tonumber(call('HGET', META, 'cooling') or 0)})
