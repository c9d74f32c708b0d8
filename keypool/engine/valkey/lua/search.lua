-- Find a key by its name, and by its hint.
-- ARGV    1 what was searched for, 2 keys to examine at most
-- reply   available, or -1; the row of the key with this name, or 0; the row of the first key by id with this hint, or 0
-- cost    O(log n + keys examined)
process_due(MAX_DUE)
local wanted, limit = ARGV[1], tonumber(ARGV[2])
local named = holder_of(wanted)
local text = named and call('ZRANGEBYSCORE', IDS, named, named)[1]
local best, best_text

local function look(from, upto)
  for _, entry in ipairs(call('ZRANGEBYLEX', TEXTS, from, upto, 'LIMIT', 0, limit)) do
    local found = entry:find('\254', 1, true) and entry:sub(-DIGEST) or entry
    local record = record_of(found)
    if record and record[EXPIRES] > NOW and (not best or record[ID] < best[ID]) then
      local shown = record[HINT] or found:sub(1, 4) .. '…' .. found:sub(-4)
      if shown == wanted then best, best_text = record, found end
    end
  end
end

if wanted:find('…', 1, true) then
  look('[' .. wanted .. '\254', '(' .. wanted .. '\255')
  look('[\254' .. wanted .. '\254', '(\254' .. wanted .. '\255')
  local start = wanted:match('^(%w%w%w%w)…')
  if start and not best then look('[' .. start, '(' .. start .. '\255') end
end
return reply_unchanged({
  text and row_of(text, record_of(text)) or 0, best and row_of(best_text, best) or 0,
})
