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
-- number; and of a secret that has or had several seats, by the id of its first one, `seats:` (sorted set: the ids of its
-- keys by id) and `secret:` (hash: core/keys.py's Group).
--
-- The first seat of a secret has its text as member and field in all of the above, the others have a zero byte and
-- their ids behind it. TEXTS and NAMES have the first one only; if that goes, the next takes its place.
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
local PACED = 19     -- theoretical arrival time of its pace (core/pace.py); missing if none was ever charged, and of
                     -- seats, as their secret has it
local WITH_PACE = 149  -- the first byte of an INFO that has a pace
local LONGEST_WAIT = 316224000000000  -- microseconds: core/pace.py
local EXTENDED = 20  -- how often the lease was extended
local SEATS = 21     -- of one of the seats of a secret: the id of the first one that it ever had
local SERVED = 22    -- how often the key was acquired; missing if a server of an older layout acquired it last
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
local of_seats     -- what is done about the seats of a secret, made when it is called for
local shares = {}  -- client, reservation, microseconds to the end (0: it is over), of each lease whose end has changed

-- The names of what is stored of a secret: its seats and its hash.
local function names_of(record)
  local first, prefix = string.format('%.0f', record[SEATS]), META:sub(1, -5)
  return prefix .. 'seats:' .. first, prefix .. 'secret:' .. first
end

-- The text of a key, or its member: the fields of all seats of a secret begin with it.
local function base_of(text, record)
  if not record[SEATS] then return text end
  if text:byte(1) == MEMBER then return text:sub(1, DIGEST) end
  return text:match('^[^%z]*')
end

-- The end of a secret's cooldown, its pace included, 0 if there was none, and how many seats there are beyond those wanted.
local function limits_of(record)
  local seats, secret = names_of(record)
  local wanted, cools = unpack(call('HMGET', secret, 'wanted', 'cools'))
  return tonumber(cools or 0), wanted and call('ZCARD', seats) - tonumber(wanted) or 0
end

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
  text = base_of(text, record)
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

-- How often a key was acquired.
local function served_of(record)
  return record[SERVED] or record[LEASE] ~= 0 and 1 or 0
end

local function record_of(text)
  local packed = call('HGET', RECORDS, text)
  return packed and cmsgpack.unpack(packed)
end

-- A field that says nothing is never set where it is missing: that would make Lua grow the table.
local function packed(record)
  local last = SERVED
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
-- NAMES has of it, nil if it has no name. Both are nil for a seat that isn't the first one.
local function entries_of(text, record)
  local imported, name
  if base_of(text, record) ~= text then return nil, nil end
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
  if record[SEALED] or record[INFO] or record[SEATS] then entry, name = entries_of(text, record) end
  if entry then call('ZREM', TEXTS, entry) end
  if name then call('ZREM', NAMES, name) end
  if record[ATTEMPT] then call('ZREM', ATTEMPTS, record[ATTEMPT] .. text) end
  if record[FORMER] and not record[SEATS] then call('DEL', META:sub(1, -5) .. 'old:' .. record[FORMER]) end
  if record[SHARE] then share_moved(record, 0) end
  if is_blocked(record) then call('ZREM', HOLDERS, holding_of(record)) end
  if record[MARK] == QUARANTINED then call('ZREM', QUARANTINE, text) end
  if record[SEATS] then of_seats().gone(text, record) end
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
  if record[SEATS] and before ~= mark then of_seats().moved(record, before, mark) end
  if before ~= mark and (before == COOLING or mark == COOLING) then
    call('HINCRBY', META, 'cooling', mark == COOLING and 1 or -1)
  end
end

-- Record that a key cools or is quarantined.
local function entered(mark, text, record, owner, origin)
  if record[SEATS] and not of_seats().is_first(mark, record) then return end
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
    if record[SEATS] then
      of_seats().end_former(record)
    else
      call('DEL', META:sub(1, -5) .. 'old:' .. record[FORMER])
      record[FORMER] = false
    end
  end
  if attempt then record[ATTEMPT], record[REPLAYED] = false, false end
  if record[EXTENDED] then record[EXTENDED] = false end
  if resting > 0 then cool_until = math.max(cool_until, at + resting) end
  local goes = false
  if record[SEATS] then
    local cools, surplus = limits_of(record)
    cool_until, goes = math.max(cool_until, cools), surplus > 0
  end
  if goes then
    if record[MARK] then record[MARK] = false end
  elseif record[MARK] == PENDING then
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
  if goes then
    freed = freed - 1
    purge(text, record, 'deleted', origin)
  end
end

-- Apply the deadlines of a block or a cooldown that have passed. A release may begin a cooldown that is over, too.
local function catch_up(text, record)
  while record[RELEASE] ~= 0 and record[RELEASE] <= NOW do
    if record[MARK] == COOLING then
      local is_first = not record[SEATS] or of_seats().is_first('ready', record)
      place(text, record, false, 0)
      if is_first then
        call('HINCRBY', META, 'ready', 1)
        emit('ready', record, text, nil, 'deadline')
      end
    else
      free(text, record, 'released', record[RELEASE], 'deadline', 0)
    end
  end
end

local moved = {}  -- new fields of seats that have taken the place of the first one in this call, by those before

-- A key whose field was read before others were processed: its field at present and its record, nil if it went with them.
local function find_again(field)
  local text = moved[field] or field
  local record = record_of(text)
  if not record and call('ZSCORE', IDS, text) then record = tombstone(text) end
  return text, record
end

-- Purge what has expired, and end blocks and cooldowns that are over, `limit` of each at most.
local function process_due(limit)
  for _, field in ipairs(call('ZRANGEBYSCORE', EXPIRY, '-inf', NOW, 'LIMIT', 0, limit)) do
    local text, record = find_again(field)
    if record then purge(text, record, 'expired', 'deadline') end
  end
  for _, field in ipairs(call('ZRANGEBYSCORE', STATES, '(0', NOW, 'LIMIT', 0, limit)) do
    local text, record = find_again(field)
    if record and record[EXPIRES] == 0 then
      purge(text, record, 'expired', 'deadline')
    elseif record then
      catch_up(text, record)
    end
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

-- What is done about the seats of a secret, as a table of functions: core/seats.py. Made at most once in a call, and only
-- where there are seats, so that calls about other keys don't pay for it.
do
  local rules
  of_seats = function()
    if rules then return rules end
    rules = {}
    local prefix = META:sub(1, -5)

    -- Forget what an interrupted move has left of a secret, which `keypool migrate --clear` doesn't find.
    function rules.begin(record)
      call('DEL', names_of(record))
    end

    -- The field of a seat that has been added as a further one to a secret with this text.
    function rules.field(base, id)
      return base .. '\0' .. string.format('%.0f', id)  -- Lua's %s would end at a zero byte of a digest
    end

    -- The field of a seat at present: when the first one goes, the next gets its field.
    function rules.where(record)
      return call('ZRANGEBYSCORE', IDS, record[ID], record[ID], 'LIMIT', 0, 1)[1]
    end

    -- All seats in order, as {field, record}, with an `except` but for this one.
    function rules.all(record, except)
      local found = {}
      for _, id in ipairs(call('ZRANGE', (names_of(record)), 0, -1)) do
        if tonumber(id) ~= except then
          local field = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
          local seat = field and record_of(field)
          if seat then found[#found + 1] = {field, seat} end
        end
      end
      return found
    end

    -- Where there are too many seats, end leases that are over in their order, as those that end first go. Returns whether
    -- anything may have changed.
    function rules.settle(record)
      local _, surplus = limits_of(record)
      if surplus <= 0 then return false end
      local seats = rules.all(record)
      for _, found in ipairs(seats) do
        if found[2][EXPIRES] <= NOW then purge(rules.where(found[2]), found[2], 'expired', 'deadline') end
      end
      table.sort(seats, function(one, other)
        if one[2][RELEASE] ~= other[2][RELEASE] then return one[2][RELEASE] < other[2][RELEASE] end
        return one[2][ID] < other[2][ID]
      end)
      for _, found in ipairs(seats) do
        if not found[2].is_gone then catch_up(rules.where(found[2]), found[2]) end
      end
      return true
    end

    -- The records of the others that live, with their deadlines applied.
    function rules.others(record)
      rules.settle(record)
      local living = {}
      for _, found in ipairs(rules.all(record, record[ID])) do
        local seat = found[2]
        if seat[EXPIRES] > NOW then
          catch_up(rules.where(seat), seat)
          if not seat.is_gone then living[#living + 1] = seat end
        end
      end
      return living
    end

    -- The number of a seat, and how many there are.
    function rules.number(record)
      local seats = names_of(record)
      return (call('ZRANK', seats, string.format('%.0f', record[ID])) or 0) + 1, call('ZCARD', seats)
    end

    -- The ids of all seats.
    function rules.ids(record)
      local ids = call('ZRANGE', (names_of(record)), 0, -1)
      for i = 1, #ids do ids[i] = tonumber(ids[i]) end
      return ids
    end

    -- So many seats are wanted from now on. It is stored only while there are more, which go when their leases end, or
    -- fewer.
    function rules.set_wanted(record, wanted)
      local seats, secret = names_of(record)
      if call('ZCARD', seats) == wanted then
        call('HDEL', secret, 'wanted')
      else
        call('HSET', secret, 'wanted', wanted)
      end
    end

    -- The cooldown of the secret begins, lasts longer, or is over (0). One that lasts longer is no event.
    function rules.cool(record, moment)
      local _, secret = names_of(record)
      if moment == 0 then
        call('HDEL', secret, 'cools', 'cooled')
        return
      end
      local cools, cooled = unpack(call('HMGET', secret, 'cools', 'cooled'))
      local before = tonumber(cools or 0)
      if moment <= before then return end
      moment = string.format('%.0f', moment)
      if before > NOW and cools == cooled then call('HSET', secret, 'cooled', moment) end
      call('HSET', secret, 'cools', moment)
    end

    -- The theoretical arrival time of the secret's pace, false if none was ever charged.
    function rules.paced(record)
      local _, secret = names_of(record)
      local paced = call('HGET', secret, 'paced')
      return paced and tonumber(paced)
    end

    -- Set it, or forget it (false).
    function rules.set_paced(record, paced)
      local _, secret = names_of(record)
      if paced then
        call('HSET', secret, 'paced', string.format('%.17g', paced))
      else
        call('HDEL', secret, 'paced')
      end
    end

    -- The secret cools until it has budget, which is counted: its seats will follow. Returns whether it does.
    function rules.keep_pace(record)
      local own, ahead = pace_of(record)
      if not own then return false end
      local ready = math.ceil((rules.paced(record) or 0) - ahead)
      if ready <= math.max(NOW, (limits_of(record))) then return false end
      rules.cool(record, ready)
      call('HINCRBY', META, 'paced', 1)
      return true
    end

    -- Charge the secret for an acquire of one of its seats.
    function rules.charge(record, own)
      rules.set_paced(record, math.max(rules.paced(record) or 0, NOW) + own)
      return rules.keep_pace(record)
    end

    -- The beginning of the cooldown until then was an event already.
    function rules.set_told(record, cools)
      local _, secret = names_of(record)
      call('HSET', secret, 'cooled', string.format('%.0f', cools))
    end

    -- Count how many seats are quarantined.
    function rules.moved(record, before, mark)
      local by = (mark == QUARANTINED and 1 or 0) - (before == QUARANTINED and 1 or 0)
      if by == 0 then return end
      local _, secret = names_of(record)
      local count = call('HINCRBY', secret, 'quarantined', by)
      if count - math.min(by, 0) > 1 then call('HINCRBY', META, 'further_quarantined', by) end
    end

    -- Whether a seat is the first of its secret to be quarantined or to cool or to be ready, or rests by itself: the event
    -- is that of this one. MARK and RELEASE are those of the cooldown.
    function rules.is_first(what, record)
      local _, secret = names_of(record)
      if what == QUARANTINED then return call('HGET', secret, 'quarantined') == '1' end
      local release = string.format('%.0f', record[RELEASE])
      if call('HGET', secret, 'cools') ~= release then return true end
      local field = what == COOLING and 'cooled' or 'ready'
      if call('HGET', secret, field) == release then return false end
      call('HSET', secret, field, release)
      return true
    end

    -- The text before a replacement names the seat no longer, but others that are leased under it.
    function rules.end_former(record)
      local former = record[FORMER]
      record[FORMER] = false
      for _, found in ipairs(rules.all(record, record[ID])) do
        local seat = found[2]
        if seat[FORMER] == former then
          call('SET', prefix .. 'old:' .. former, string.format('%.0f.%.0f', seat[ID], seat[LEASE]))
          return
        end
      end
      call('DEL', prefix .. 'old:' .. former)
    end

    -- Store a key, new or moved, as one of the seats.
    function rules.add(record)
      local seats = names_of(record)
      call('ZADD', seats, record[ID], string.format('%.0f', record[ID]))
      if call('ZCARD', seats) > 1 then call('HINCRBY', META, 'further', 1) end
      if record[MARK] == QUARANTINED then rules.moved(record, false, QUARANTINED) end
    end

    -- Put a key in its place under another field.
    function rules.rename(from, to, record)
      moved[from] = to
      call('HDEL', RECORDS, from)
      save(to, record)
      local set, score = STATES, record[RELEASE]
      if record[MARK] == QUARANTINED then set, score = QUARANTINE, record[ID] end
      call('ZREM', set, from)
      call('ZADD', set, score, to)
      call('ZREM', IDS, from)
      call('ZADD', IDS, record[ID], to)
      if record[EXPIRES] ~= NEVER then
        call('ZREM', EXPIRY, from)
        call('ZADD', EXPIRY, record[EXPIRES], to)
      end
      if record[ATTEMPT] then
        call('ZREM', ATTEMPTS, record[ATTEMPT] .. from)
        call('ZADD', ATTEMPTS, 0, record[ATTEMPT] .. to)
      end
    end

    -- A seat was purged: if it was the first one, the next takes its place.
    function rules.gone(text, record)
      record.is_gone = true
      if record[MARK] == QUARANTINED then rules.moved(record, QUARANTINED, false) end
      local seats, secret = names_of(record)
      call('ZREM', seats, string.format('%.0f', record[ID]))
      if record[FORMER] then rules.end_former(record) end
      local id = call('ZRANGE', seats, 0, 0)[1]
      if not id then
        call('DEL', secret)
        return
      end
      call('HINCRBY', META, 'further', -1)
      local _, surplus = limits_of(record)
      if surplus == 0 then call('HDEL', secret, 'wanted') end
      local field = call('ZRANGEBYSCORE', IDS, id, id, 'LIMIT', 0, 1)[1]
      local heir = field and text == base_of(text, record) and record_of(field)
      if not heir then return end
      local to = base_of(field, heir)
      rules.rename(field, to, heir)
      local entry, name = entries_of(to, heir)
      call('ZADD', TEXTS, 0, entry)
      if name then call('ZADD', NAMES, 0, name) end
    end

    -- Let the others follow a seat that was used or reported on; `leaving` to quarantine.
    function rules.follow(record, leaving, origin)
      local cools = limits_of(record)
      for _, seat in ipairs(rules.others(record)) do
        local field = rules.where(seat)
        local blocked = seat[RELEASE] ~= 0 and seat[MARK] ~= COOLING
        if record[HISTORY] or seat[HISTORY] then seat[HISTORY] = record[HISTORY] or false end
        if leaving and blocked then
          seat[MARK] = PENDING
          save(field, seat)
        elseif leaving and seat[MARK] ~= QUARANTINED then
          place(field, seat, QUARANTINED, 0)
          entered(QUARANTINED, field, seat, nil, origin)
        elseif not leaving and seat[RELEASE] == 0 and seat[MARK] ~= QUARANTINED and cools > NOW then
          place(field, seat, COOLING, cools)
          entered(COOLING, field, seat, nil, origin)
        elseif seat[MARK] == COOLING and cools > seat[RELEASE] then
          place(field, seat, COOLING, cools)
        else
          save(field, seat)
        end
      end
    end

    return rules
  end
end
