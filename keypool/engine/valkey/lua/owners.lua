-- List who holds keys here, in order of name: by owner, then by client, without a name first.
-- ARGV    1 the holder after whom to begin, as `holder_of` has it ('' for the first), 2 holders at most
-- reply   available; 1 if there may be more, else 0; for each {holder, keys held, when the oldest lease began}
-- cost    O(holders * log n)
process_due(MAX_DUE)
local results, from = {0}, ARGV[1] == '' and '-' or '(' .. ARGV[1] .. '\255'
local looked_at, most = 0, tonumber(ARGV[2])
while #results <= most and looked_at < most + 1000 do
  looked_at = looked_at + 1
  local member = call('ZRANGEBYLEX', HOLDERS, from, '+', 'LIMIT', 0, 1)[1]
  if not member then return reply(results) end
  local holder, lease, id = parts_of(member)
  local record = held_under(lease, id)
  if record then
    results[#results + 1] = {
      holder, call('ZLEXCOUNT', HOLDERS, '[' .. holder, '(' .. holder .. '\255'), record[ACQUIRED] or NOW,
    }
    from = '(' .. holder .. '\255'
  else
    call('ZREM', HOLDERS, member)
  end
end
results[1] = #call('ZRANGEBYLEX', HOLDERS, from, '+', 'LIMIT', 0, 1)
return reply(results)
