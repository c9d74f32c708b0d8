-- The load of `bench http` for wrk. The first argument is the kind of load, the second a file with keys, one a line.
-- "mixed" is acquire, unblock under the lease that it gave, and keepalive, a third of each.
local freed, first, last, turn = {}, 1, 0, 0
local keepalives, count = {}, 0
local json = {["Content-Type"] = "application/json"}
local acquire, asked

function init(args)
    local file = io.open(args[2])
    for text in file and file:lines() or function() end do
        count = count + 1
        keepalives[count] = wrk.format("POST", "/api/v1/keys/" .. text .. "/keepalive")
    end
    acquire = wrk.format("POST", "/api/v1/keys/acquire")
    asked = wrk.format("POST", args[1])
    if args[1] == "keepalive" then
        request, response = keepalive, nil
    elseif args[1] ~= "mixed" then
        request, response = constant, nil
    end
end

function keepalive()
    return keepalives[math.random(count)]
end

function constant()
    return asked
end

function request()
    turn = turn + 1
    if turn % 3 == 0 then
        return keepalives[math.random(count)]
    end
    if first <= last then
        local lease = freed[first]
        freed[first] = nil
        first = first + 1
        local key, number = lease:match('"key":"(%w+)","lease":(%d+)')
        return wrk.format("POST", "/api/v1/keys/" .. key .. "/unblock", json, '{"lease":' .. number .. '}')
    end
    return acquire
end

function response(status, _, body)
    if status == 200 and body:find('"lease":', 1, true) then
        last = last + 1
        freed[last] = body
    end
end
