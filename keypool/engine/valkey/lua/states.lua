-- For scripts that reply the states of keys.

-- A key's state at this moment by its deadlines, and the microseconds left of its block or its cooldown.
local function state_of(record)
  local mark, left = record[MARK], record[RELEASE] - NOW
  if mark == QUARANTINED then return 'quarantined', 0 end
  if record[RELEASE] == 0 then return 'available', 0 end
  if left > 0 then return mark == COOLING and 'cooling' or 'blocked', left end
  if mark == PENDING then return 'quarantined', 0 end
  if mark ~= COOLING then
    local ready = record[RELEASE] + resting
    if record[SEATS] then ready = math.max(ready, (limits_of(record))) end
    left = with_budget(record, ready) - NOW
    if left > 0 then return 'cooling', left end
  end
  return 'available', 0
end
