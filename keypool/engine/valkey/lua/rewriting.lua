-- For scripts that change what is stored of a key's text and details.

-- Store a key under a member, which may be another one than before, with its record as it is now. `entry` and `name` are
-- what TEXTS and NAMES had of it before.
local function rewrite(text, member, record, entry, name)
  if member ~= text then of_seats().rename(text, member, record) else save(member, record) end
  local new_entry, new_name = entries_of(member, record)
  if new_entry ~= entry then
    if entry then call('ZREM', TEXTS, entry) end
    if new_entry then call('ZADD', TEXTS, 0, new_entry) end
  end
  if new_name ~= name then
    if name then call('ZREM', NAMES, name) end
    if new_name then call('ZADD', NAMES, 0, new_name) end
  end
end
