-- For scripts that read HOLDERS.

-- The holder of a member, as holder_of has it, and the lease and the id, as texts that compare as numbers do.
local function parts_of(member)
  local holder, rest = member:match('^(%Z*%z%Z*%z)(%d+)$')
  return holder, rest:sub(1, 16), rest:sub(17)
end

-- The record of a key that is held under a lease, and its text; nil if it isn't, which can be only if Valkey evicted
-- its record.
local function held_under(lease, id)
  local text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
  local record = text and record_of(text)
  if record and is_blocked(record) and string.format('%016.0f', record[LEASE]) == lease then return record, text end
  return nil
end
