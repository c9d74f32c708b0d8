-- Included after common.lua in every script that serves calls. If no server has polled this partition for a while, it
-- was unreachable: nobody could keep its keys alive, so none may be purged before grace.lua has given them time. If
-- the moment of the latest poll is missing, the partition was emptied. In both cases nothing is executed, so the
-- caller may repeat the call.
local draining
do
  local seen, since, rest, pace, history
  seen, since, rest, draining, pace, history =
    unpack(call('HMGET', META, 'seen', 'since', 'rest', 'draining', 'pace', 'history'))
  if not seen then
    return redis.error_reply('GONE the pool was emptied, or part of it')
  end
  if since or NOW - seen > AWAY then
    return redis.error_reply('UNATTENDED no server has polled this partition for a while')
  end
  resting = tonumber(rest or 0)
  if pace then
    interval, tolerance = pace:match('(%S+) (%S+)')
    interval, tolerance = tonumber(interval), tonumber(tolerance)
  end
  recording = tonumber(history or 0)
end
