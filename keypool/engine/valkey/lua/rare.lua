-- List rare events, newest first.
-- ARGV    1 moment, 2 number: only events of an earlier moment, or of this one with a lesser number ('' for all), 3 events
--         at most, 4 kind ('' for all)
-- reply   available, or -1; 1 if there may be more, else 0; each event as it is stored
-- cost    O(1000)
local at, number, limit, kind = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local results, last = {0}, -1
while true do
  local events = call('LRANGE', RARE, last - 99, last)
  for i = #events, 1, -1 do
    local event = cmsgpack.unpack(events[i])
    local is_before = not at or event[RARE_AT] < at or (event[RARE_AT] == at and event[RARE_NUMBER] < number)
    if is_before and (kind == '' or event[RARE_KIND] == kind) then
      if #results > limit then
        results[1] = 1
        return reply_unchanged(results)
      end
      results[#results + 1] = events[i]
    end
  end
  if #events < 100 then return reply_unchanged(results) end
  last = last - 100
end
