-- Goes between common.lua and every script that serves. A partition that no server has polled for a while was out of
-- reach: nobody could keep its keys alive, so none may be purged before grace.lua has given them time. One that doesn't
-- know when it was polled was emptied. In both cases nothing is executed, so the caller may repeat.
do
  local seen, since = unpack(call('HMGET', META, 'seen', 'since'))
  if not seen then
    return redis.error_reply('GONE the pool was emptied, or part of it')
  end
  if since or NOW - seen > AWAY then
    return redis.error_reply('UNATTENDED no server has polled this partition for a while')
  end
end
