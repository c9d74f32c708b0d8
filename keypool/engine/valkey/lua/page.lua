-- List keys in an order, from a position on. Keys with the same score are in order of their texts, byte by byte.
-- ARGV    1 order: id, expiry, release, ready, text or name, 2 state, or '' for all, 3 rows at most, 4 keys to examine at
--         most, 5 position: a score ('' for the first), or in order of text or name the one to begin with, 6 of the keys
--         with that score, only those after this text; in order of text or name, only keys after it, as TEXTS or NAMES
--         has it ('' for all), 7 in order of text or name: the prefix
-- reply   available; 1 if there may be more, else 0; each row, and behind its fields its score in the order, or what
--         TEXTS or NAMES has of it; if there may be more, also the same of the last key that was examined
-- cost    O(log n + keys examined), O(log² n) for a position among keys with the same score
process_due(MAX_DUE)
local order, state, limit, most = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local after, passed = ARGV[5], ARGV[6]
local set = ({id = IDS, expiry = EXPIRY, release = STATES, ready = STATES, text = TEXTS, name = NAMES})[order]
local by_word = order == 'text' or order == 'name'
if order == 'id' and state == 'quarantined' then set = QUARANTINE end

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
  if after == '' then return set == STATES and call('ZCOUNT', set, '-inf', 0) or 0 end
  if order == 'id' then return call('ZCOUNT', set, '-inf', after) end
  local low = call('ZCOUNT', set, '-inf', '(' .. after)
  local high = low + call('ZCOUNT', set, after, after)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if beyond(call('ZRANGE', set, middle, middle)[1], passed) then high = middle else low = middle + 1 end
  end
  return low
end

-- The text of what stands in the set. A key that is gone stands among texts and names only where Valkey evicted records.
local function text_of(entry)
  if not by_word then return entry end
  local text = entry
  if order == 'name' then
    local id = entry:match('%z(%d+)$')
    text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1] or ''
  else
    text = entry:find('\254', 1, true) and entry:sub(-DIGEST) or entry
  end
  if call('HEXISTS', RECORDS, text) == 0 then call('ZREM', set, entry) end
  return text
end

-- The reply. Leases that are over may let seats go, and others take their places in the order: then it is read again.
local function list()
  local found, step
  if by_word then
    local least = passed ~= '' and '(' .. passed or '[' .. after
    found, step = call('ZRANGEBYLEX', set, least, '[' .. ARGV[7] .. '\255', 'LIMIT', 0, most + 1), 1
  else
    local first = start()
    found, step = call('ZRANGE', set, first, first + most, 'WITHSCORES'), 2
  end
  local results, rows, last, settled = {0}, 0, nil, false
  for i = 1, #found, step do
    if rows >= limit or i > most * step then
      results[1] = 1
      break
    end
    local text = text_of(found[i])
    local record = record_of(text) or tombstone(text)
    if record[SEATS] and record[RELEASE] ~= 0 and record[RELEASE] <= NOW and of_seats().settle(record) then
      settled = true
    end
    last = row_of(text, record)
    last[#last + 1] = step == 2 and tonumber(found[i + 1]) or found[i]
    if record[EXPIRES] > NOW and (state == '' or state == last[7]) then
      rows = rows + 1
      results[#results + 1] = last
    end
  end
  if settled then return list() end
  if results[1] == 1 then results[#results + 1] = last or false end
  return results
end

return reply(list())
