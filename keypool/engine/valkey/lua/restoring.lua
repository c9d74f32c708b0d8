-- For scripts that end cooldowns and quarantines.

-- Make a cooling or quarantined key available, or let it cool until it has budget.
local function end_exclusion(text, record, origin)
  local release, spent = with_budget(record, NOW)
  place(text, record, spent and COOLING, spent and release or 0)
  call('HINCRBY', META, 'restored', 1)
  emit('restored', record, text, nil, origin)
  if spent then
    call('HINCRBY', META, 'paced', 1)
    entered(COOLING, text, record, nil, origin)
  end
end
