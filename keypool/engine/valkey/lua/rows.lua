-- For scripts that reply rows; after states.lua.

-- A row, as pages.py reads it: {text, id, created, lease, owner or '', microseconds to its expiry, state, microseconds
-- left of it (0 if available or quarantined), failures in a row, microseconds since the last one, outcome or '',
-- reason or '', client or '', hint or '' if the text is in clear, INFO or '', number of the seat, seats of its secret,
-- moment of the acquire, 0 if it isn't blocked, how often it was acquired}.
local function row_of(text, record)
  local state, left = state_of(record)
  local history = record[HISTORY] or {0, 0}
  local owner = state == 'blocked' and record[OWNER] or ''
  local seat, seats = 1, 1
  if record[SEATS] and not record.is_gone then seat, seats = of_seats().number(record) end
  local reason = state == 'quarantined' and history[5] or history[4] or ''
  return {
    text, record[ID], record[CREATED], record[LEASE], owner, record[EXPIRES] - NOW, state, left, history[1],
    NOW - history[2], history[3] or '', reason, state == 'blocked' and record[CLIENT] or '', record[HINT] or '',
    record[INFO] or '', seat, seats, state == 'blocked' and record[ACQUIRED] or 0,
    served_of(record),
  }
end
