-- Claim an attempt for a while, so that no two acquires are made for it at a time; or give a claim up. Only in pools
-- with several partitions, in the one that the attempt's digest determines: a key may be drawn in any other.
-- ARGV    1 attempt, 2 name of the claim, 3 microseconds after which it lapses (0: give it up, if nobody else has it),
--         4 microseconds after which the attempt is forgotten, as no lease of it can be held any more (0: at once);
--         without 2, 3 and 4, look only. An attempt that nobody claims has the claim '-'
-- reply   available, or -1; 0 if the attempt isn't known, 1 if it is, so that it may hold leases, -1 if somebody else
--         has claimed it
-- cost    O(1)
--
-- An attempt is a key of its own, which Valkey removes in time. Its name has the hash tag of the others.
local attempt = META:sub(1, -5) .. 'attempt:' .. ARGV[1]
local kept = call('GET', attempt)
if ARGV[2] then
  local claim, ends = (kept or '- 0'):match('^(%S+) (%d+)$')
  local lasts, forget = tonumber(ARGV[3]), math.ceil(tonumber(ARGV[4]) / 1000)
  if claim ~= ARGV[2] and (lasts == 0 or tonumber(ends) > NOW) then return reply_unchanged({-1}) end
  if forget == 0 then
    call('DEL', attempt)
  elseif lasts == 0 then
    call('SET', attempt, '- 0', 'PX', forget)
  else
    call('SET', attempt, string.format('%s %.0f', ARGV[2], NOW + lasts), 'PX', forget)
  end
end
return reply_unchanged({kept and 1 or 0})
