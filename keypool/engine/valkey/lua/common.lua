-- At the top of every script; scripts.py includes more, and replaces the constants below by their values. A script
-- first processes what is overdue in its partition.
--
-- KEYS, the same thirteen for every script, all with one hash tag, so that they lie in one slot:
--   1 meta       hash: `id`, the number of the latest id, `tick`, that of the latest lease, the counters of stats,
--                `cooling`, how many keys cool, `rest`, how long keys rest after each lease (missing if they don't),
--                `pace`, interval and tolerance of the pool's pace (missing if it has none),
--                `history`, how many leases that have ended are kept here (missing if none are),
--                `indexed`, the score in STATES up to which HOLDERS is complete, -1 for all (poll.lua),
--                `seen`, when a server last polled, `since`, the value of `seen` when grace.lua began (only while it
--                is at work), `sweepers`, the two servers that sweep here (poll.lua), `reserved`, room reserved for keys
--                that are about to be generated (room.lua), `odd`, how many calls stored texts that look like other
--                names, `rekeyed` (reseal.lua), `revision`, that of the settings of the registry that are
--                known here (rules.lua), and `draining`, 1 while the pool is being emptied for good
--   2 records    hash: text -> record
--   3 states     sorted set: text by the deadline at which its block or its cooldown ends, by 0 while available; not
--                while quarantined
--   4 expiry     sorted set: text by its expiry deadline; not if it never expires
--   5 ids        sorted set: text by id: all keys
--   6 texts      sorted set: text by 0, so that it is in order of text; of sealed keys see entries_of
--   7 events     list: the latest changes, oldest first
--   8 quarantine sorted set: text by id, while quarantined
--   9 attempts   sorted set: attempt .. text by 0, while the key is blocked and its acquire named an attempt; so the
--                leases of an attempt stand together
--  10 names      sorted set: name, a zero byte, id, by 0; only of keys that were given a name
--  11 holders    sorted set: holder_of .. lease, of 16 digits .. id, by 0, while the key is blocked
--  12 rare       list: the latest rare events (core/rare_events.py), oldest first: each an array whose fields are named
--                below
--  13 waiters    hash: server -> "number of acquires that wait there, moment at which this lapses"; missing if none
--                waits. Its name is also the channel on which freed keys are published: for the server named, or for
--                all (*).
-- Keys of their own, with the same hash tag: `attempt:` and an attempt (claim.lua), `lock:` and a word (lock.lua),
-- `alias:` and a member (alias.lua), `old:` and a member (FORMER); `released:` and the number of a RELEASED_SLOT of time,
-- a hash of holder_of to how many of its leases ended by their deadlines in it (released.lua); `ended`, a list of "id
-- lease" in the order in which these leases ended, and `past:` and an id, a sorted set of the leases of that key that have
-- ended, each {lease, moments of acquire and end, how, owner, client, outcome, reason, how often it was extended} by its
-- number.
-- Where a text is said to be a member or a field above, that is so of a key in clear. A pool with secrets keys holds no
-- text: there it is MEMBER, the byte 254 and 16 bytes of a keyed digest of the text, and the text itself, with the key's
-- data, is in the record, sealed by the server (engine/valkey/vault.py). Texts are UTF-8, which has no such byte.
-- A record is an array whose fields are named below: without the last ones if they say nothing, and with false for
-- others that say nothing. Of a key that was never served, it has five.
--    state        MARK         RELEASE                      the fields OWNER, ACQUIRED, ATTEMPT, REPLAYED, CLIENT,
--                                                           SHARE, EXTENDED
--    available    nothing      0                            say nothing
--    blocked      nothing      when the block ends          say something
--    blocked      PENDING      the same                     the same; it is quarantined when its lease ends
--    cooling      COOLING      when the cooldown ends       say nothing
--    quarantined  QUARANTINED  0                            say nothing
-- Moments are microseconds since the epoch by this Valkey's clock; records and events are MessagePack.
-- A name of a key is its text, or \255 and its id, or \255, its id, a point and the number of a lease that must be its
-- latest; or a member, and behind it another name that counts if no key has that member (a clear text, if the pool may
-- still have some, or what else the caller may have meant). No text begins with the byte 255, which UTF-8 doesn't have.
-- An origin is `holder`, `deadline`, or `operator`, a space and the name of the operator's token.
-- Every reply begins with the number of available keys, -1 if it is unchanged; or with -2 less that number, if leases
-- that stand in a share have ended or end later: then `shares` is the last. calls.py removes both.
--
-- The rules are those of core/pool.py and core/outcomes.py, implemented a second time; the tests drive both alike.
-- If memory is short or the disk fails, Valkey refuses a script's first write, so nothing was done, and none after
-- that. Overdue keys are processed even if memory is short: these steps begin with a write that needs none.
--
-- A record may be missing, if Valkey evicted it. Its key is then purged when a script comes across it.

if redis.replicate_commands then redis.replicate_commands() end  -- before Redis 7, to write after TIME

local META = KEYS[1]
local RECORDS = KEYS[2]
local STATES = KEYS[3]
local EXPIRY = KEYS[4]
local IDS = KEYS[5]
local TEXTS = KEYS[6]
local EVENTS = KEYS[7]
local QUARANTINE = KEYS[8]
local ATTEMPTS = KEYS[9]
local NAMES = KEYS[10]
local HOLDERS = KEYS[11]
local RARE = KEYS[12]
local WAITERS = KEYS[13]
local ID = 1
local CREATED = 2
local LEASE = 3      -- number of the latest one, 0 if it was never served
local EXPIRES = 4    -- expiry deadline, NEVER if there is none
local RELEASE = 5    -- deadline of a block or a cooldown, else 0
local OWNER = 6      -- the holder's name
local ACQUIRED = 7   -- moment of the acquire; missing too if a server of layout 1 acquired it
local ATTEMPT = 8    -- 16 bytes, if the acquire named one
local MARK = 9       -- see above
local REPORTED = 10  -- whether the latest lease can't report any more
local HISTORY = 11   -- {failures in a row, moment of the last, outcome, reason, operator's reason}: core/outcomes.py
local REPLAYED = 12  -- whether the lease was given to its attempt again
local CLIENT = 13    -- name of the token that holds the key
local SEALED = 14    -- the text and the data, encrypted; missing if the key is in clear
local HINT = 15      -- what may be shown of a sealed text
local INFO = 16      -- MessagePack: {whether it was imported, name, labels, data if it is in clear}, and behind these its
                     -- own pace if it has one: {count, seconds, burst}
local FORMER = 17    -- the member with which the lease was given, if the text was replaced since: `old:` and this member
                     -- has its id and lease, and it names the key until the lease ends
local SHARE = 18     -- the reservation in the share of CLIENT, if that may hold so many leases and no more (shares.py)
local PACED = 19     -- theoretical arrival time of its pace (core/pace.py); missing if none was ever charged
local WITH_PACE = 149  -- the first byte of an INFO that has a pace
local LONGEST_WAIT = 316224000000000  -- microseconds: core/pace.py
local EXTENDED = 20  -- how often the lease was extended
local OPERATOR = 111  -- the first byte of an operator's origin
local RARE_KIND = 1  -- of a rare event: change, id, both parts of the hint, owner and lease of the first key; origin;
local RARE_ORIGIN = 7
local RARE_NUMBER = 8  -- counts from 1
local RARE_COUNT = 9   -- of keys
local RARE_AT = 10     -- moment of the first
local NEVER = 9007199254740992
local MEMBER = 254   -- the first byte of a sealed key's member
local DIGEST = 17    -- length of such a member
local COOLING = 'c'
local QUARANTINED = 'q'
local PENDING = 'p'
local KEPT_EVENTS = 64  -- events that a poll reports at most; up to four times as many are kept, to trim rarely
local MAX_DUE = 32      -- overdue keys of each kind that a call processes on its way
local MAX_FORGOTTEN = 500  -- leases of a history that was made shorter which a poll forgets at most
local MOST_RARE = 1000        -- rare events that are kept
local CROWD = 1000000         -- microseconds for which others join a rare event
local RELEASED_SLOT = 30000000    -- microseconds; counts of ten slots are read, and of so many holders at most kept
local MOST_RELEASED = 10000
local AWAY = 5000000    -- microseconds without a poll after which no server serves the partition

local resting = 0  -- microseconds that a key cools after each lease, as attended.lua reads it
local interval, tolerance  -- of the pool's pace in microseconds, nil if it has none, likewise
local recording = 0  -- how many leases that have ended are kept, likewise
local call = redis.call
local clock = call('TIME')
local NOW = clock[1] * 1000000 + clock[2]
local freed = 0
local shares = {}  -- client, reservation, microseconds to the end (0: it is over), of each lease whose end has changed

local newest      -- the newest rare event, once it was read
local has_grown = false
local function save_newest()
  if has_grown then call('LSET', RARE, -1, cmsgpack.pack(newest)) end
  has_grown = false
end

-- Add a rare event, or let the newest one grow, which `reply` stores.
local function add_rare(event)
  if not newest then
    local packed = call('LINDEX', RARE, -1)
    newest = packed and cmsgpack.unpack(packed) or {'', 0, '', '', false, 0, '', 0, 0, 0}
  end
  local alike = newest[RARE_KIND] == event[RARE_KIND] and newest[RARE_ORIGIN] == event[RARE_ORIGIN]
  if alike and NOW - newest[RARE_AT] < CROWD then
    newest[RARE_COUNT] = newest[RARE_COUNT] + 1
    has_grown = true
    return
  end
  save_newest()
  event[RARE_NUMBER], event[RARE_COUNT], event[RARE_AT] = newest[RARE_NUMBER] + 1, 1, NOW
  newest = event
  if call('RPUSH', RARE, cmsgpack.pack(event)) > MOST_RARE then call('LTRIM', RARE, -MOST_RARE, -1) end
end

local is_rare = {generated = 1, imported = 1, deleted = 1, expired = 1, revealed = 1, quarantined = 1, restored = 1}

-- Add an event. Its last part is its moment, as poller.py expects.
local function emit(change, record, text, owner, origin)
  local start, finish = text:sub(1, 4), text:sub(-4)
  if record[HINT] then start, finish = record[HINT], false end
  if is_rare[change] or change == 'unblocked' and origin:byte(1) == OPERATOR then
    add_rare({change, record[ID], start, finish, owner or false, record[LEASE], origin})
  end
  local event = {change, record[ID], start, finish, owner or false, record[LEASE], origin, NOW}
  if call('RPUSH', EVENTS, cmsgpack.pack(event)) > 4 * KEPT_EVENTS then
    call('LTRIM', EVENTS, -KEPT_EVENTS, -1)
  end
end

local function record_of(text)
  local packed = call('HGET', RECORDS, text)
  return packed and cmsgpack.unpack(packed)
end

-- A field that says nothing is never set where it is missing: that would make Lua grow the table.
local function packed(record)
  local last = EXTENDED
  while not record[last] do
    if record[last] == false then record[last] = nil end
    last = last - 1
  end
  for field = OWNER, last - 1 do
    if not record[field] then record[field] = false end
  end
  return cmsgpack.pack(record)
end

local function save(text, record)
  call('HSET', RECORDS, text, packed(record))
end

-- A substitute for a missing record: expired, with the id, and with a mark by which its key is purged from QUARANTINE.
local function tombstone(text)
  local record = {tonumber(call('ZSCORE', IDS, text) or 0), 0, 0, 0, 0, false, false, false, QUARANTINED}
  if text:byte(1) == MEMBER then record[HINT] = '…' end
  return record
end

-- What TEXTS has of a key: its text; of a sealed one its hint and its member, so that it is found by its first
-- characters; and before these the byte 254 if it was imported, as only texts that were generated are found so. And what
-- NAMES has of it, nil if it has no name.
local function entries_of(text, record)
  local imported, name
  if record[INFO] then
    imported, name = unpack(cmsgpack.unpack(record[INFO]), 1, 2)
    name = name and string.format('%s\0%.0f', name, record[ID])
  end
  if not record[SEALED] then return text, name end
  return (imported and '\254' or '') .. record[HINT] .. text, name
end

-- Who holds a key: owner and client, '' for none, each with a zero byte behind it, which no name has.
local function holder_of(record)
  return (record[OWNER] or '') .. '\0' .. (record[CLIENT] or '') .. '\0'
end

-- What HOLDERS has of a key that is held.
local function holding_of(record)
  return holder_of(record) .. string.format('%016.0f%.0f', record[LEASE], record[ID])
end

local function is_blocked(record)
  return record[RELEASE] ~= 0 and record[MARK] ~= COOLING
end

-- Count that a lease ended by its deadline.
local function count_released(holder)
  local counts = META:sub(1, -5) .. 'released:' .. math.floor(NOW / RELEASED_SLOT)
  if call('HLEN', counts) < MOST_RELEASED or call('HEXISTS', counts, holder) == 1 then
    if call('HINCRBY', counts, holder, 1) == 1 then call('PEXPIRE', counts, 11 * RELEASED_SLOT / 1000) end
  end
end

-- Let the server know that a lease which stands in a share has ended, or ends later.
local function share_moved(record, left)
  local count = #shares
  shares[count + 1], shares[count + 2], shares[count + 3] = record[CLIENT], record[SHARE], left
end

-- Forget the oldest leases that have ended and are too many, `limit` of them at most.
local function forget_past(limit)
  local place = META:sub(1, -5)
  local over = math.min(call('LLEN', place .. 'ended') - recording, limit)
  if over <= 0 then return end
  local oldest = redis.pcall('LPOP', place .. 'ended', over)
  if oldest.err then return end  -- Valkey refuses writes, and this may be the first one of a poll
  for _, lease in ipairs(oldest) do
    local id, number = lease:match('(%d+) (%d+)')
    call('ZREMRANGEBYSCORE', place .. 'past:' .. id, number, number)
  end
end

-- What is kept of a lease that ends at this moment.
local function past_of(record, at, how, outcome, reason)
  return cmsgpack.pack({
    record[LEASE], record[ACQUIRED] or at, at, how, record[OWNER] or false, record[CLIENT] or false, outcome or false,
    reason or false, record[EXTENDED] or 0,
  })
end

-- Keep it. Not the first write of a script, as it needs memory.
local function keep_past(record, past)
  local place, id = META:sub(1, -5), string.format('%.0f', record[ID])
  local lease = string.format('%.0f', record[LEASE])
  call('ZADD', place .. 'past:' .. id, lease, past)
  call('RPUSH', place .. 'ended', id .. ' ' .. lease)
  forget_past(2)
end

-- Remove a key, in any state. The first write is one for which Valkey needs no memory.
local function purge(text, record, change, origin)
  call('HDEL', RECORDS, text)
  local release = record[RELEASE]
  if recording > 0 and release ~= 0 and record[MARK] ~= COOLING then
    local at, how = NOW, 'deleted'
    if change == 'expired' then
      at, how = record[EXPIRES], 'expired'
      if release <= at then at, how = release, 'released' end
    end
    keep_past(record, past_of(record, at, how))
  end
  call('ZREM', STATES, text)
  call('ZREM', EXPIRY, text)
  call('ZREM', IDS, text)
  local entry, name = text, nil
  if record[SEALED] or record[INFO] then entry, name = entries_of(text, record) end
  call('ZREM', TEXTS, entry)
  if name then call('ZREM', NAMES, name) end
  if record[ATTEMPT] then call('ZREM', ATTEMPTS, record[ATTEMPT] .. text) end
  if record[FORMER] then call('DEL', META:sub(1, -5) .. 'old:' .. record[FORMER]) end
  if record[SHARE] then share_moved(record, 0) end
  if is_blocked(record) then call('ZREM', HOLDERS, holding_of(record)) end
  if record[MARK] == QUARANTINED then call('ZREM', QUARANTINE, text) end
  if record[MARK] == COOLING then call('HINCRBY', META, 'cooling', -1) end
  call('HINCRBY', META, change, 1)
  emit(change, record, text, record[OWNER], origin)
end

-- Put a key that nobody holds (any more) into the state of this MARK (false for none) and RELEASE. An available one is
-- counted as freed. The first write is possible even if memory is short: then HSET may be refused, but neither HDEL
-- nor any write after it.
local function place(text, record, mark, release)
  local before = record[MARK]
  if before or mark then record[MARK] = mark end
  record[RELEASE] = release
  local new = packed(record)
  if type(redis.pcall('HSET', RECORDS, text, new)) == 'table' then
    call('HDEL', RECORDS, text)
    call('HSET', RECORDS, text, new)
  end
  if mark == QUARANTINED then
    call('ZREM', STATES, text)
    call('ZADD', QUARANTINE, record[ID], text)
  else
    call('ZADD', STATES, release, text)
    if release == 0 then freed = freed + 1 end
  end
  if before == QUARANTINED then call('ZREM', QUARANTINE, text) end
  if before ~= mark and (before == COOLING or mark == COOLING) then
    call('HINCRBY', META, 'cooling', mark == COOLING and 1 or -1)
  end
end

-- Record that a key cools or is quarantined.
local function entered(mark, text, record, owner, origin)
  call('HINCRBY', META, mark == COOLING and 'cooled' or 'quarantines', 1)
  emit(mark == COOLING and 'cooled' or 'quarantined', record, text, owner, origin)
end

-- Interval and tolerance of a key's pace, its own or the pool's, in microseconds; nil if it has none.
local function pace_of(record)
  local info = record[INFO]
  if info and info:byte(1) == WITH_PACE then
    local count, seconds, burst = unpack(cmsgpack.unpack(info)[5])
    local own = seconds * 1000000 / count
    return own, (burst - 1) * own
  end
  return interval, tolerance
end

-- The end of a cooldown that must not end before the key has budget, and whether that makes it longer.
local function with_budget(record, release)
  if not record[PACED] then return release, false end
  local own, ahead = pace_of(record)
  local ready = own and math.ceil(record[PACED] - ahead) or 0
  return math.max(release, ready), ready > release
end

-- End a lease at a moment: the key is available, or cools first, or is quarantined.
local function free(text, record, change, at, origin, cool_until, outcome, reason)
  local past
  if recording > 0 then
    local how = change == 'unblocked' and origin:byte(1) == OPERATOR and 'revoked' or change
    local expires = record[EXPIRES]
    if how == 'released' and expires < at then  -- it has expired before, and isn't purged yet
      past = past_of(record, expires, 'expired')
    else
      past = past_of(record, at, how, outcome, reason)
    end
  end
  local owner, attempt, mark, release, spent = record[OWNER], record[ATTEMPT], false, 0, false
  local holding, holder = holding_of(record), change == 'released' and holder_of(record)
  record[OWNER], record[ACQUIRED] = false, false
  if record[SHARE] then
    share_moved(record, 0)
    record[SHARE] = false
  end
  if record[CLIENT] then record[CLIENT] = false end
  if record[FORMER] then
    call('DEL', META:sub(1, -5) .. 'old:' .. record[FORMER])
    record[FORMER] = false
  end
  if attempt then record[ATTEMPT], record[REPLAYED] = false, false end
  if record[EXTENDED] then record[EXTENDED] = false end
  if resting > 0 then cool_until = math.max(cool_until, at + resting) end
  if record[MARK] == PENDING then
    mark = QUARANTINED
  else
    cool_until, spent = with_budget(record, math.max(cool_until, at))
    if cool_until > at then mark, release = COOLING, cool_until end
  end
  place(text, record, mark, release)
  if spent then call('HINCRBY', META, 'paced', 1) end
  call('ZREM', HOLDERS, holding)
  if holder then count_released(holder) end
  if attempt then call('ZREM', ATTEMPTS, attempt .. text) end
  if past then keep_past(record, past) end
  call('HINCRBY', META, change, 1)
  emit(change, record, text, owner, origin)
  if mark then entered(mark, text, record, owner, origin) end
end

-- Apply the deadlines of a block or a cooldown that have passed. A release may begin a cooldown that is over, too.
local function catch_up(text, record)
  while record[RELEASE] ~= 0 and record[RELEASE] <= NOW do
    if record[MARK] == COOLING then
      place(text, record, false, 0)
      call('HINCRBY', META, 'ready', 1)
      emit('ready', record, text, nil, 'deadline')
    else
      free(text, record, 'released', record[RELEASE], 'deadline', 0)
    end
  end
end

-- Purge what has expired, and end blocks and cooldowns that are over, `limit` of each at most.
local function process_due(limit)
  for _, text in ipairs(call('ZRANGEBYSCORE', EXPIRY, '-inf', NOW, 'LIMIT', 0, limit)) do
    purge(text, record_of(text) or tombstone(text), 'expired', 'deadline')
  end
  for _, text in ipairs(call('ZRANGEBYSCORE', STATES, '(0', NOW, 'LIMIT', 0, limit)) do
    local record = record_of(text)
    if record then catch_up(text, record) else purge(text, tombstone(text), 'expired', 'deadline') end
  end
end

local function available()
  return call('ZCOUNT', STATES, 0, 0)
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
  save_newest()
  if freed > 0 then publish_freed(freed) end
  local count = available()
  if #shares > 0 then
    count = -2 - count
    results[#results + 1] = shares
  end
  table.insert(results, 1, count)
  return results
end

-- The reply of a script that itself changes no key's availability; what it processed that was overdue may have.
local function reply_unchanged(results)
  save_newest()
  if freed > 0 or #shares > 0 then return reply(results) end
  table.insert(results, 1, -1)
  return results
end
