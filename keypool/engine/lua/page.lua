-- Keys in an order, from a position on.
-- ARGV    1 order: id, expiry, release or text, 2 state: available, blocked or '' for both, 3 rows at most,
--         4 keys to look at, at most (ties are looked at to their end), 5 position: a number, or for text the text
--         to begin with, 6 only keys beyond this id at that very number (-1: all); for text, only keys beyond
--         this text ('' for all), 7 for text: the prefix
-- answer  available; 1 if there may be more, else 0; {text, id, created, lease, owner or '', microseconds to
--         expiry, to release (0: available), place in the order} of each row, in order; and at last the same
--         of the last key that was looked at, if there may be more
-- cost    O(log n + keys looked at)
settle(SETTLED)
local order, state, limit, most, after = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[6]
local sets = {id = IDS, expiry = EXPIRY, release = STATES, text = TEXTS}
local found
if order == 'text' then
  local least = after ~= '' and '(' .. after or '[' .. ARGV[5]
  found = call('ZRANGEBYLEX', TEXTS, least, '[' .. ARGV[7] .. '\255', 'LIMIT', 0, most + 1)
else
  found = call('ZRANGEBYSCORE', sets[order], ARGV[5], '+inf', 'LIMIT', 0, most + 1)
end

local said = {0}
local function row(text, place)
  local record = record_of(text)
  local left = math.max(0, record[5] - NOW)
  local shown = record[4] > NOW and (state == '' or (state == 'blocked') == (left ~= 0))
  local owner = left ~= 0 and record[6] or ''
  return shown, {text, record[1], record[2], record[3], owner, record[4] - NOW, left, place}
end

-- Where a key stands in the order.
local function places(text)
  return order == 'text' and 0 or tonumber(call('ZSCORE', sets[order], text))
end

local rows, place, last = 0, nil, nil
if #found > most then said[1] = 1 end
for examined, text in ipairs(found) do
  local here = places(text)
  if (rows >= limit or examined > most) and (order == 'text' or here ~= place) then
    said[1] = 1
    break
  end
  place = here
  local shown, made = row(text, here)
  local passed = order ~= 'text' and here == tonumber(ARGV[5]) and made[2] <= tonumber(after)
  if not passed then
    last = made
    if shown then
      rows = rows + 1
      said[#said + 1] = made
    end
  end
end
if said[1] == 1 then said[#said + 1] = last or false end
return answer(said)
