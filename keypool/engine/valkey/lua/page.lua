-- List keys in an order, from a position on. Keys with the same score are in order of their texts, byte by byte.
-- ARGV    1 order: id, expiry, release or text, 2 state: available, blocked or '' for both, 3 rows at most,
--         4 keys to examine at most, 5 position: a score ('' for the first), or in order of text the text to begin
--         with, 6 of the keys with that score, only those after this text; in order of text, only keys after it ('' for
--         all), 7 in order of text: the prefix
-- reply   available; 1 if there may be more, else 0; {text, id, created, lease, owner or '', microseconds to
--         expiry, to release (0: available), score in the order} of each row; if there may be more, also
--         the same of the last key that was examined
-- cost    O(log n + keys examined), O(log² n) for a position among keys with the same score
process_due(MAX_DUE)
local order, state, limit, most = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local after, passed = ARGV[5], ARGV[6]
local set = ({id = IDS, expiry = EXPIRY, release = STATES, text = TEXTS})[order]

-- Whether a text comes after another one in a sorted set. Lua's own comparison goes by the locale.
local function beyond(one, other)
  for i = 1, math.min(#one, #other) do
    local this, that = one:byte(i), other:byte(i)
    if this ~= that then return this > that end
  end
  return #one > #other
end

-- The rank of the first key beyond the position.
local function start()
  if after == '' then return order == 'release' and call('ZCOUNT', set, '-inf', 0) or 0 end
  if order == 'id' then return call('ZCOUNT', set, '-inf', after) end
  local low = call('ZCOUNT', set, '-inf', '(' .. after)
  local high = low + call('ZCOUNT', set, after, after)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if beyond(call('ZRANGE', set, middle, middle)[1], passed) then high = middle else low = middle + 1 end
  end
  return low
end

local found, step
if order == 'text' then
  local least = passed ~= '' and '(' .. passed or '[' .. after
  found, step = call('ZRANGEBYLEX', set, least, '[' .. ARGV[7] .. '\255', 'LIMIT', 0, most + 1), 1
else
  local first = start()
  found, step = call('ZRANGE', set, first, first + most, 'WITHSCORES'), 2
end

local function row(text, place)
  local record = record_of(text) or tombstone(text)
  local left = math.max(0, record[5] - NOW)
  local shown = record[4] > NOW and (state == '' or (state == 'blocked') == (left ~= 0))
  local owner = left ~= 0 and record[6] or ''
  return shown, {text, record[1], record[2], record[3], owner, record[4] - NOW, left, place}
end

local results = {0}
local rows, last = 0, nil
for i = 1, #found, step do
  if rows >= limit or i > most * step then
    results[1] = 1
    break
  end
  local shown, made = row(found[i], step == 2 and tonumber(found[i + 1]) or 0)
  last = made
  if shown then
    rows = rows + 1
    results[#results + 1] = made
  end
end
if results[1] == 1 then results[#results + 1] = last or false end
return reply(results)
