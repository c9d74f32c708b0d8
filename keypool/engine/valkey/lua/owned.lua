-- List the keys that an owner holds here, in order of lease.
-- ARGV    1 owner, 2 '' for any client, or = and its name, 3 the lease after which to begin, 4 keys at most
-- reply   available; 1 if there may be more, else 0; the latest lease of the partition; each row
-- cost    O(clients of the owner * (log n + keys))
process_due(MAX_DUE)
local owner, client, limit = ARGV[1], ARGV[2], tonumber(ARGV[4])
local after = string.format('%016.0f', tonumber(ARGV[3]))
local found, more = {}, 0

local function take_from(holder)
  local members =
    call('ZRANGEBYLEX', HOLDERS, '(' .. holder .. after .. ':', '(' .. holder .. '\255', 'LIMIT', 0, limit + 1)
  if #members > limit then more = 1 end
  for _, member in ipairs(members) do
    local _, lease, id = parts_of(member)
    found[#found + 1] = {lease, id, member}
  end
end

if client ~= '' then
  take_from(owner .. '\0' .. client:sub(2) .. '\0')
else
  local from = '[' .. owner .. '\0'
  while true do
    local member = call('ZRANGEBYLEX', HOLDERS, from, '(' .. owner .. '\1', 'LIMIT', 0, 1)[1]
    if not member then break end
    local holder = parts_of(member)
    take_from(holder)
    from = '(' .. holder .. '\255'
  end
end
table.sort(found, function(one, other) return one[1] < other[1] end)
if #found > limit then more = 1 end
local results = {more, tonumber(call('HGET', META, 'tick') or 0)}
for i = 1, math.min(#found, limit) do
  local lease, id, member = unpack(found[i])
  local record, text = held_under(lease, id)
  if record then
    results[#results + 1] = row_of(text, record)
  else
    call('ZREM', HOLDERS, member)
  end
end
return reply(results)
