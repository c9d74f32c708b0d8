-- List keys that aren't sealed under a certain secrets key, in order of id.
-- ARGV    1 the first 4 bytes of what that one sealed, 2 id after which to go on, '' to go on where META's `rekeyed` says,
--         3 keys to examine
-- reply   available, or -1; the last id that was examined, -1 if there are no more; how many were; {id, text or '' if it
--         is sealed, sealed text or '', INFO or ''} of each
-- cost    O(log n + keys examined)
local after = ARGV[2]
if after == '' then
  local under, done = (call('HGET', META, 'rekeyed') or ''):match('^(%x+) (%d+)$')
  after = under == ARGV[1]:gsub('.', function(c) return string.format('%02x', c:byte()) end) and done or '0'
end
local results = {-1, 0}
local found = call('ZRANGEBYSCORE', IDS, '(' .. after, '+inf', 'LIMIT', 0, tonumber(ARGV[3]))
for _, text in ipairs(found) do
  local record = record_of(text)
  if record then
    local sealed = record[SEALED]
    if not sealed or sealed:sub(1, 4) ~= ARGV[1] then
      results[#results + 1] = {record[ID], sealed and '' or base_of(text, record), sealed or '', record[INFO] or ''}
    end
  end
end
if #found == tonumber(ARGV[3]) then results[1] = tonumber(call('ZSCORE', IDS, found[#found])) end
results[2] = #found
return reply_unchanged(results)
