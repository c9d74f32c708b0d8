-- Included at the top of every script. A script first processes what is overdue in its partition.
--
-- KEYS, the same eight for every script, all with one hash tag, so that they lie in one slot:
--   1 meta    hash: `id`, the number of the latest id, `tick`, that of the latest lease, the counters of stats,
--             `seen`, when a server last polled, `since`, the value of `seen` when grace.lua began (only while it is
--             at work), `sweepers`, the two servers that sweep here (poll.lua), and `reserved`, room reserved for keys
--             that are about to be generated (room.lua)
--   2 records hash: text -> {id, created, lease (0: never served), expiry deadline, release deadline (0: available),
--             owner (only while blocked and named)}
--   3 states  sorted set: text by its release deadline, so by 0 while available
--   4 expiry  sorted set: text by its expiry deadline
--   5 ids     sorted set: text by id
--   6 texts   sorted set: text by 0, so that it is in order of text
--   7 events  list: the latest changes, oldest first
--   8 waiters hash: server -> "number of acquires that wait there, moment at which this lapses"; missing if none waits.
--             Its name is also the channel on which freed keys are published: for the server named, or for all (*).
-- Moments are microseconds since the epoch by this Valkey's clock; records and events are msgpack.
-- Every reply begins with the number of available keys, -1 if it is unchanged, which calls.py removes.
--
-- The rules are those of core/pool.py, implemented a second time; the contract tests check both.
-- If memory is short or the disk fails, Valkey refuses a script's first write, so nothing was done, and none after that.
-- What is overdue is processed even if memory is short, as those steps begin with a write that needs none.
--
-- A record may be missing, if Valkey evicted it. Its key is then purged when a script comes across it.

if redis.replicate_commands then redis.replicate_commands() end  -- before Redis 7, to write after TIME

local META, RECORDS, STATES, EXPIRY, IDS, TEXTS, EVENTS, WAITERS = unpack(KEYS)
local KEPT_EVENTS = 64  -- events that a poll reports at most; up to four times as many are kept, to trim rarely
local MAX_DUE = 32      -- overdue keys of each kind that a call processes on its way
local AWAY = 5000000    -- microseconds without a poll after which no server serves the partition
local call = redis.call
local clock = call('TIME')
local NOW = clock[1] * 1000000 + clock[2]
local freed = 0

local function emit(change, record, text, owner)
  local event = {change, record[1], text:sub(1, 4), text:sub(-4), owner or false, record[3], NOW}
  if call('RPUSH', EVENTS, cmsgpack.pack(event)) > 4 * KEPT_EVENTS then
    call('LTRIM', EVENTS, -KEPT_EVENTS, -1)
  end
end

local function record_of(text)
  local packed = call('HGET', RECORDS, text)
  return packed and cmsgpack.unpack(packed)
end

local function save(text, record)
  call('HSET', RECORDS, text, cmsgpack.pack(record))
end

-- A substitute for a missing record: expired, with the id, which is enough to purge its key.
local function tombstone(text)
  return {tonumber(call('ZSCORE', IDS, text) or 0), 0, 0, 0, 0}
end

-- Remove a key, available or blocked. The first write is one for which Valkey needs no memory.
local function purge(text, record, change)
  call('HDEL', RECORDS, text)
  call('ZREM', STATES, text)
  call('ZREM', EXPIRY, text)
  call('ZREM', IDS, text)
  call('ZREM', TEXTS, text)
  call('HINCRBY', META, change, 1)
  emit(change, record, text, record[6])
end

-- Make a blocked key available. If memory is short, HSET may be refused, but neither HDEL nor any write after it.
local function free(text, record, change)
  local owner = record[6]
  record[5], record[6] = 0, nil
  local packed = cmsgpack.pack(record)
  if type(redis.pcall('HSET', RECORDS, text, packed)) == 'table' then
    call('HDEL', RECORDS, text)
    call('HSET', RECORDS, text, packed)
  end
  call('ZADD', STATES, 0, text)
  call('HINCRBY', META, change, 1)
  emit(change, record, text, owner)
  freed = freed + 1
end

-- Purge and release what is overdue, `limit` of each at most.
local function process_due(limit)
  for _, text in ipairs(call('ZRANGEBYSCORE', EXPIRY, '-inf', NOW, 'LIMIT', 0, limit)) do
    purge(text, record_of(text) or tombstone(text), 'expired')
  end
  for _, text in ipairs(call('ZRANGEBYSCORE', STATES, '(0', NOW, 'LIMIT', 0, limit)) do
    local record = record_of(text)
    if record then free(text, record, 'released') else purge(text, tombstone(text), 'expired') end
  end
end

-- The record of a live key, brought up to this moment; nil if there is no such key.
local function live(text)
  local record = record_of(text)
  if not record then return nil end
  if record[4] <= NOW then
    purge(text, record, 'expired')
    return nil
  end
  if record[5] ~= 0 and record[5] <= NOW then free(text, record, 'released') end
  return record
end

-- Add a key, a new one or one that is moved in.
local function add(text, record)
  save(text, record)
  call('ZADD', STATES, record[5], text)
  call('ZADD', EXPIRY, record[4], text)
  call('ZADD', IDS, record[1], text)
  call('ZADD', TEXTS, 0, text)
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
