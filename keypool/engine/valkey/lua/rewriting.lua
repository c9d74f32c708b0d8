-- For scripts that change what is stored of a key's text and details.

-- Store a key under a member, which may be another one than before, with its record as it is now. `entry` and `name` are
-- what TEXTS and NAMES had of it before.
local function rewrite(text, member, record, entry, name)
  save(member, record)
  if member ~= text then
    call('HDEL', RECORDS, text)
    local set, score = STATES, record[RELEASE]
    if record[MARK] == QUARANTINED then set, score = QUARANTINE, record[ID] end
    call('ZREM', set, text)
    call('ZADD', set, score, member)
    call('ZREM', IDS, text)
    call('ZADD', IDS, record[ID], member)
    if record[EXPIRES] ~= NEVER then
      call('ZREM', EXPIRY, text)
      call('ZADD', EXPIRY, record[EXPIRES], member)
    end
    if record[ATTEMPT] then
      call('ZREM', ATTEMPTS, record[ATTEMPT] .. text)
      call('ZADD', ATTEMPTS, 0, record[ATTEMPT] .. member)
    end
  end
  local new_entry, new_name = entries_of(member, record)
  if new_entry ~= entry then
    call('ZREM', TEXTS, entry)
    call('ZADD', TEXTS, 0, new_entry)
  end
  if new_name ~= name then
    if name then call('ZREM', NAMES, name) end
    if new_name then call('ZADD', NAMES, 0, new_name) end
  end
end
