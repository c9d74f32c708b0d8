-- Included at the top of every script. A script first processes what is overdue in its partition.
--
-- KEYS, the same ten for every script, all with one hash tag, so that they lie in one slot:
--   1 meta       hash: `id`, the number of the latest id, `tick`, that of the latest lease, the counters of stats,
--                `cooling`, how many keys cool, `rest`, how long keys rest after each lease (missing if they don't),
--                `seen`, when a server last polled, `since`, the value of `seen` when grace.lua began (only while it
--                is at work), `sweepers`, the two servers that sweep here (poll.lua), and `reserved`, room reserved
--                for keys that are about to be generated (room.lua)
--   2 records    hash: text -> record
--   3 states     sorted set: text by the deadline at which its block or its cooldown ends, by 0 while available; not
--                while quarantined
--   4 expiry     sorted set: text by its expiry deadline
--   5 ids        sorted set: text by id
--   6 texts      sorted set: text by 0, so that it is in order of text
--   7 events     list: the latest changes, oldest first
--   8 quarantine sorted set: text by id, while quarantined
--   9 attempts   sorted set: attempt .. text by 0, while the key is blocked and its acquire named an attempt; so the
--                leases of an attempt stand together
--  10 waiters    hash: server -> "number of acquires that wait there, moment at which this lapses"; missing if none
--                waits. Its name is also the channel on which freed keys are published: for the server named, or for
--                all (*).
-- A record is an array whose fields are named below: without the last ones if they say nothing, and with false for
-- others that say nothing. Of a key that was never served, it has five.
--    state        MARK         RELEASE                      the fields OWNER, ACQUIRED, ATTEMPT, REPLAYED
--    available    nothing      0                            say nothing
--    blocked      nothing      when the block ends          say something
--    blocked      PENDING      the same                     the same; it is quarantined when its lease ends
--    cooling      COOLING      when the cooldown ends       say nothing
--    quarantined  QUARANTINED  0                            say nothing
-- Moments are microseconds since the epoch by this Valkey's clock; records and events are MessagePack.
-- A name of a key is its text, or \255 and its id, or \255, its id, a point and the number of a lease that must be its
-- latest; no text begins with the byte 255, which UTF-8 doesn't have. An origin is the word `holder`, or `operator`, a
-- space and the name of the operator's token.
-- Every reply begins with the number of available keys, -1 if it is unchanged, which calls.py removes.
--
-- The rules are those of core/pool.py and core/outcomes.py, implemented a second time; the tests drive both alike.
-- If memory is short or the disk fails, Valkey refuses a script's first write, so nothing was done, and none after that.
-- What is overdue is processed even if memory is short, as those steps begin with a write that needs none.
--
-- A record may be missing, if Valkey evicted it. Its key is then purged when a script comes across it.

if redis.replicate_commands then redis.replicate_commands() end  -- before Redis 7, to write after TIME

local META, RECORDS, STATES, EXPIRY, IDS, TEXTS, EVENTS, QUARANTINE, ATTEMPTS, WAITERS = unpack(KEYS)
local ID, CREATED = 1, 2
local LEASE = 3      -- number of the latest one, 0 if it was never served
local EXPIRES = 4    -- expiry deadline
local RELEASE = 5    -- deadline of a block or a cooldown, else 0
local OWNER = 6      -- the holder's name
local ACQUIRED = 7   -- moment of the acquire; missing too if a server of layout 1 acquired it
local ATTEMPT = 8    -- 16 bytes, if the acquire named one
local MARK = 9       -- see above
local REPORTED = 10  -- whether the latest lease can't report any more
local HISTORY = 11   -- {failures in a row, moment of the last one, outcome, reason, operator's reason}: core/outcomes.py
local REPLAYED = 12  -- whether the lease was given to its attempt again
local COOLING, QUARANTINED, PENDING = 'c', 'q', 'p'
local HOLDER, DEADLINE = {'holder', false}, {'deadline', false}
local KEPT_EVENTS = 64  -- events that a poll reports at most; up to four times as many are kept, to trim rarely
local MAX_DUE = 32      -- overdue keys of each kind that a call processes on its way
local AWAY = 5000000    -- microseconds without a poll after which no server serves the partition
local REST = 0          -- microseconds that a key cools after each lease; attended.lua reads them
local call = redis.call
local clock = call('TIME')
local NOW = clock[1] * 1000000 + clock[2]
local freed = 0

local function origin_of(word)
  local by, actor = word:match('^(%a+) ?(.*)$')
  return {by, actor ~= '' and actor}
end

-- Add an event. The last part is its moment, as poller.py expects.
local function emit(change, record, text, owner, origin)
  local start, last = text:sub(1, 4), text:sub(-4)
  local event = {change, record[ID], start, last, owner or false, record[LEASE], origin[1], origin[2], NOW}
  if call('RPUSH', EVENTS, cmsgpack.pack(event)) > 4 * KEPT_EVENTS then
    call('LTRIM', EVENTS, -KEPT_EVENTS, -1)
  end
end

local function count(counter)
  call('HINCRBY', META, counter, 1)
end

local function record_of(text)
  local packed = call('HGET', RECORDS, text)
  return packed and cmsgpack.unpack(packed)
end

local function packed(record)
  local needed = false
  for field = REPLAYED, OWNER, -1 do
    if record[field] then
      needed = true
    elseif needed then
      record[field] = false
    else
      record[field] = nil
    end
  end
  return cmsgpack.pack(record)
end

local function save(text, record)
  call('HSET', RECORDS, text, packed(record))
end

-- The same even if memory is short: then HSET may be refused, but neither HDEL nor any write after it.
local function save_anyway(text, record)
  local new = packed(record)
  if type(redis.pcall('HSET', RECORDS, text, new)) == 'table' then
    call('HDEL', RECORDS, text)
    call('HSET', RECORDS, text, new)
  end
end

-- A substitute for a missing record: expired, with the id, and with a mark by which its key is purged from QUARANTINE.
local function tombstone(text)
  return {tonumber(call('ZSCORE', IDS, text) or 0), 0, 0, 0, 0, false, false, false, QUARANTINED}
end

local function is_blocked(record)
  return record[RELEASE] ~= 0 and record[MARK] ~= COOLING
end

-- Remove a key, in any state. The first write is one for which Valkey needs no memory.
local function purge(text, record, change, origin)
  call('HDEL', RECORDS, text)
  call('ZREM', STATES, text)
  call('ZREM', EXPIRY, text)
  call('ZREM', IDS, text)
  call('ZREM', TEXTS, text)
  if record[ATTEMPT] then call('ZREM', ATTEMPTS, record[ATTEMPT] .. text) end
  if record[MARK] == QUARANTINED then call('ZREM', QUARANTINE, text) end
  if record[MARK] == COOLING then call('HINCRBY', META, 'cooling', -1) end
  count(change)
  emit(change, record, text, record[OWNER], origin)
end

-- Put a key that nobody holds (any more) into the state of this MARK and RELEASE. An available one is counted as freed.
local function place(text, record, mark, release)
  local before = record[MARK]
  record[MARK], record[RELEASE] = mark, release
  save_anyway(text, record)
  if mark == QUARANTINED then
    call('ZREM', STATES, text)
    call('ZADD', QUARANTINE, record[ID], text)
  else
    call('ZADD', STATES, release, text)
    if before == QUARANTINED then call('ZREM', QUARANTINE, text) end
    if release == 0 then freed = freed + 1 end
  end
  local cooling = (mark == COOLING and 1 or 0) - (before == COOLING and 1 or 0)
  if cooling ~= 0 then call('HINCRBY', META, 'cooling', cooling) end
end

-- Record that a key cools or is quarantined.
local function entered(mark, text, record, owner, origin)
  count(mark == COOLING and 'cooled' or 'quarantines')
  emit(mark == COOLING and 'cooled' or 'quarantined', record, text, owner, origin)
end

-- End a lease at a moment: the key is available, or cools first, or is quarantined.
local function free(text, record, change, at, origin, cool_until)
  local owner, attempt, mark, release = record[OWNER], record[ATTEMPT], nil, 0
  record[OWNER], record[ACQUIRED], record[ATTEMPT], record[REPLAYED] = nil, nil, nil, nil
  if REST > 0 then cool_until = math.max(cool_until, at + REST) end
  if record[MARK] == PENDING then
    mark = QUARANTINED
  elseif cool_until > at then
    mark, release = COOLING, cool_until
  end
  place(text, record, mark, release)
  if attempt then call('ZREM', ATTEMPTS, attempt .. text) end
  count(change)
  emit(change, record, text, owner, origin)
  if mark then entered(mark, text, record, owner, origin) end
end

-- Apply the deadlines of a block or a cooldown that have passed. A release may begin a cooldown that is over, too.
local function catch_up(text, record)
  while record[RELEASE] ~= 0 and record[RELEASE] <= NOW do
    if record[MARK] == COOLING then
      place(text, record, nil, 0)
      count('ready')
      emit('ready', record, text, nil, DEADLINE)
    else
      free(text, record, 'released', record[RELEASE], DEADLINE, 0)
    end
  end
end

-- Purge what has expired, and end blocks and cooldowns that are over, `limit` of each at most.
local function process_due(limit)
  for _, text in ipairs(call('ZRANGEBYSCORE', EXPIRY, '-inf', NOW, 'LIMIT', 0, limit)) do
    purge(text, record_of(text) or tombstone(text), 'expired', DEADLINE)
  end
  for _, text in ipairs(call('ZRANGEBYSCORE', STATES, '(0', NOW, 'LIMIT', 0, limit)) do
    local record = record_of(text)
    if record then catch_up(text, record) else purge(text, tombstone(text), 'expired', DEADLINE) end
  end
end

-- Whether a word is the number of the key's latest lease. Compared as texts, since a client's number may exceed what Lua
-- can represent. 0 is not a lease: never served.
local function is_latest(record, lease)
  return lease ~= '0' and lease == string.format('%.0f', record[LEASE])
end

-- The record of a live key, brought up to this moment, its text, and whether the name has a lease that isn't the latest;
-- nil if there is no such key.
local function find(name)
  local text, lease = name, ''
  if name:byte(1) == 255 then
    local id
    id, lease = name:match('^\255(-?%d+)%.?(%d*)$')
    text = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
  end
  local record = text and record_of(text)
  if not record then return nil end
  if record[EXPIRES] <= NOW then
    purge(text, record, 'expired', DEADLINE)
    return nil
  end
  catch_up(text, record)
  return record, text, lease ~= '' and not is_latest(record, lease)
end

-- What a change replies about a key that it can't change: 0 if it is unknown, -(latest lease) if another one was named.
local function refusal(record)
  return record and -record[LEASE] or 0
end

-- A key's state at this moment by its deadlines, and the microseconds left of its block or its cooldown.
local function state_of(record)
  local mark, left = record[MARK], record[RELEASE] - NOW
  if mark == QUARANTINED then return 'quarantined', 0 end
  if record[RELEASE] == 0 then return 'available', 0 end
  if left > 0 then return mark == COOLING and 'cooling' or 'blocked', left end
  if mark == PENDING then return 'quarantined', 0 end
  if mark ~= COOLING and left + REST > 0 then return 'cooling', left + REST end
  return 'available', 0
end

-- A row, as pages.py reads it: {text, id, created, lease, owner or '', microseconds to its expiry, state, microseconds
-- left of it (0 if available or quarantined), failures in a row, microseconds since the last one, outcome or '', reason
-- or ''}.
local function row_of(text, record)
  local state, left = state_of(record)
  local history = record[HISTORY] or {0, 0}
  local owner = state == 'blocked' and record[OWNER] or ''
  local reason = state == 'quarantined' and history[5] or history[4] or ''
  return {
    text, record[ID], record[CREATED], record[LEASE], owner, record[EXPIRES] - NOW, state, left, history[1],
    NOW - history[2], history[3] or '', reason,
  }
end

-- The leases that an attempt was given and that are still held: {text, id, lease, microseconds to its expiry, to its
-- release, 1} of each. They count as given again from now on.
local function leases_of(attempt)
  local leases = {}
  for _, member in ipairs(call('ZRANGEBYLEX', ATTEMPTS, '[' .. attempt, '(' .. attempt .. '\255')) do
    local text = member:sub(#attempt + 1)
    local record = record_of(text)
    if record and record[ATTEMPT] == attempt and record[EXPIRES] > NOW and record[RELEASE] > NOW then
      if not record[REPLAYED] then
        record[REPLAYED] = true
        save(text, record)
      end
      leases[#leases + 1] = {text, record[ID], record[LEASE], record[EXPIRES] - NOW, record[RELEASE] - NOW, 1}
    end
  end
  return leases
end

-- Add a key, a new one or one that is moved in.
local function add(text, record)
  save(text, record)
  call('ZADD', EXPIRY, record[EXPIRES], text)
  call('ZADD', IDS, record[ID], text)
  call('ZADD', TEXTS, 0, text)
  if record[MARK] == QUARANTINED then
    call('ZADD', QUARANTINE, record[ID], text)
  else
    call('ZADD', STATES, record[RELEASE], text)
  end
  if record[MARK] == COOLING then count('cooling') end
  if record[ATTEMPT] then call('ZADD', ATTEMPTS, 0, record[ATTEMPT] .. text) end
end

local function available()
  return call('ZCOUNT', STATES, 0, 0)
end

-- The room that is reserved (room.lua) under names other than `name`, and those reservations as they are stored.
local function reserved_but(name)
  local sum, others = 0, {}
  for held, keys, ends in (call('HGET', META, 'reserved') or ''):gmatch('(%S+) (%d+) (%d+);') do
    if held ~= name and tonumber(ends) > NOW then
      sum = sum + tonumber(keys)
      others[#others + 1] = held .. ' ' .. keys .. ' ' .. ends .. ';'
    end
  end
  return sum, table.concat(others)
end

local function reserve(reservations)
  if reservations == '' then call('HDEL', META, 'reserved') else call('HSET', META, 'reserved', reservations) end
end

-- Publish freed keys: one key to one server, chosen at random in proportion to its waiters; several to all servers.
-- Errors are ignored, as the user may have no right to publish: servers with waiters look for keys four times a second
-- anyway.
local function publish_freed(count)
  local waiters, total = call('HGETALL', WAITERS), 0
  if #waiters == 0 then return end
  local counts = {}
  for i = 2, #waiters, 2 do
    local waiting, ends = waiters[i]:match('(%d+) (%d+)')
    counts[i] = tonumber(ends) > NOW and tonumber(waiting) or 0
    total = total + counts[i]
  end
  if count > 1 then
    redis.pcall('PUBLISH', WAITERS, '*')
  elseif total > 0 then
    local chosen = NOW % total
    for i = 2, #waiters, 2 do
      chosen = chosen - counts[i]
      if chosen < 0 then
        redis.pcall('PUBLISH', WAITERS, waiters[i - 1])
        return
      end
    end
  end
end

local function reply(results)
  if freed > 0 then publish_freed(freed) end
  table.insert(results, 1, available())
  return results
end

-- The reply of a script that itself changes no key's availability; what it processed that was overdue may have.
local function reply_unchanged(results)
  if freed > 0 then return reply(results) end
  table.insert(results, 1, -1)
  return results
end
