-- The queue of one model. Requests of one tenant wait in order of arrival; between tenants the one that has
-- received the fewest tokens is served first. Counts and times here are no money and fit a double exactly.
--
-- keys: 1 jobs (request to payload), 2 line (places of waiting requests, in lexical order), 3 places (request
-- to place, also while claimed), 4 turns (tenants with waiting requests by tokens received), 5 served (the
-- same count of tenants with nothing waiting), 6 deadlines, 7 claims (by expiry of the lease), 8 owners
-- (request to owner and attempt), 9 meta (seq, floor, last, gap).

local JOBS, LINE, PLACES, TURNS, SERVED, DEADLINES, CLAIMS, OWNERS, META = 1, 2, 3, 4, 5, 6, 7, 8, 9
-- One tenant may fill at most eight times the places that are still free, so that the last ninth of a queue
-- is there for the others.
local SHARE = 8
local RETRY_MS_MIN, RETRY_MS_MAX, RETRY_MS_UNKNOWN = 100, 10000, 1000

local function pack_place(place)
  return table.concat({
    place.tenant, string.format('%016.0f', place.seq), whole(place.attempt), whole(place.cost),
    whole(place.deadline), place.request,
  }, '\31')
end

local function unpack_place(text)
  local tenant, seq, attempt, cost, deadline, request =
    string.match(text, '^([^\31]*)\31(%d+)\31(%d+)\31(%d+)\31(%d+)\31(.*)$')
  return {
    tenant = tenant, seq = tonumber(seq), attempt = tonumber(attempt), cost = tonumber(cost),
    deadline = tonumber(deadline), request = request,
  }
end

local function waiting_of(keys, tenant)
  return redis.call('ZLEXCOUNT', keys[LINE], '[' .. tenant .. '\31', '(' .. tenant .. '\32')
end

-- What a tenant that comes back from idling is lifted to, so that it cannot save up turns while away.
local function floor_of(keys)
  local lowest = redis.call('ZRANGE', keys[TURNS], 0, 0, 'WITHSCORES')
  return tonumber(lowest[2] or redis.call('HGET', keys[META], 'floor') or '0')
end

local function take_place_in_turns(keys, tenant)
  if redis.call('ZSCORE', keys[TURNS], tenant) then
    return
  end
  local received = tonumber(redis.call('ZSCORE', keys[SERVED], tenant) or '0')
  redis.call('ZADD', keys[TURNS], whole(math.max(received, floor_of(keys))), tenant)
  redis.call('ZREM', keys[SERVED], tenant)
end

local function leave_turns_if_done(keys, tenant)
  local received = redis.call('ZSCORE', keys[TURNS], tenant)
  if not received or waiting_of(keys, tenant) > 0 then
    return
  end
  redis.call('ZREM', keys[TURNS], tenant)
  redis.call('ZADD', keys[SERVED], received, tenant)
  if redis.call('ZCARD', keys[TURNS]) == 0 then
    redis.call('HSET', keys[META], 'floor', whole(tonumber(received)))
  end
  -- Whoever stands at or below the floor would be lifted to it anyway: not worth remembering.
  redis.call('ZREMRANGEBYSCORE', keys[SERVED], '-inf', whole(floor_of(keys)))
end

local function charge(keys, tenant, tokens)
  if redis.call('ZSCORE', keys[TURNS], tenant) then
    redis.call('ZINCRBY', keys[TURNS], whole(tokens), tenant)
    return
  end
  local floor = floor_of(keys)
  local received = math.max(tonumber(redis.call('ZSCORE', keys[SERVED], tenant) or '0'), floor) + tokens
  if received > floor then
    redis.call('ZADD', keys[SERVED], whole(received), tenant)
  end
end

local function forget(keys, request, place)
  redis.call('ZREM', keys[LINE], place)
  redis.call('HDEL', keys[JOBS], request)
  redis.call('HDEL', keys[PLACES], request)
  redis.call('HDEL', keys[OWNERS], request)
  redis.call('ZREM', keys[DEADLINES], request)
  redis.call('ZREM', keys[CLAIMS], request)
end

-- About how long until an eighth of a full queue has been claimed, at the pace of late.
local function retry_ms(keys, depth_max)
  local gap = tonumber(redis.call('HGET', keys[META], 'gap') or '')
  if not gap then
    return RETRY_MS_UNKNOWN
  end
  return math.floor(math.min(RETRY_MS_MAX, math.max(RETRY_MS_MIN, gap * depth_max / SHARE)))
end

local function note_pace(keys, claimed, now)
  local past = redis.call('HMGET', keys[META], 'last', 'gap')
  if past[1] then
    local gap = math.max(0, now - tonumber(past[1])) / claimed
    local mean = past[2] and (0.75 * tonumber(past[2]) + 0.25 * gap) or gap
    redis.call('HSET', keys[META], 'gap', string.format('%.3f', mean))
  end
  redis.call('HSET', keys[META], 'last', whole(now))
end

local function publish(keys, args)
  local request, tenant, payload, cost = args[1], args[2], args[3], tonumber(args[4])
  local wait_ms, depth_max, channel = tonumber(args[5]), tonumber(args[6]), args[7]
  if redis.call('HEXISTS', keys[JOBS], request) == 1 then
    return {'published'}
  end
  local free = depth_max - redis.call('ZCARD', keys[LINE])
  if free <= 0 or waiting_of(keys, tenant) >= SHARE * free then
    return {'full', retry_ms(keys, depth_max)}
  end
  local deadline = now_ms() + wait_ms
  local seq = redis.call('HINCRBY', keys[META], 'seq', 1)
  local place = pack_place{
    tenant = tenant, seq = seq, attempt = 0, cost = cost, deadline = deadline, request = request,
  }
  redis.call('HSET', keys[JOBS], request, payload)
  redis.call('HSET', keys[PLACES], request, place)
  redis.call('ZADD', keys[LINE], 0, place)
  redis.call('ZADD', keys[DEADLINES], whole(deadline), request)
  take_place_in_turns(keys, tenant)
  redis.call('PUBLISH', channel, '1')
  return {'published'}
end

local function claim(keys, args)
  local owner, room, lease_ms = args[1], tonumber(args[2]), tonumber(args[3])
  local now = now_ms()
  local claims = {}
  while #claims < room do
    local tenant = redis.call('ZRANGE', keys[TURNS], 0, 0)[1]
    if not tenant then
      break
    end
    local first =
      redis.call('ZRANGEBYLEX', keys[LINE], '[' .. tenant .. '\31', '(' .. tenant .. '\32', 'LIMIT', 0, 1)[1]
    if first then
      local place = unpack_place(first)
      local request = place.request
      local payload = redis.call('HGET', keys[JOBS], request)
      redis.call('ZREM', keys[LINE], first)
      -- One that is past its deadline is not served late: it keeps its deadline, by which it will be expired.
      if payload and place.deadline > now then
        place.attempt = place.attempt + 1
        redis.call('HSET', keys[PLACES], request, pack_place(place))
        redis.call('HSET', keys[OWNERS], request, owner .. '\31' .. whole(place.attempt))
        redis.call('ZADD', keys[CLAIMS], whole(now + lease_ms), request)
        redis.call('ZREM', keys[DEADLINES], request)
        charge(keys, tenant, place.cost)
        claims[#claims + 1] = {request, place.attempt, payload}
      end
    end
    leave_turns_if_done(keys, tenant)
  end
  if #claims > 0 then
    note_pace(keys, #claims, now)
  end
  return claims
end

local function owns(keys, owner, request, attempt)
  return redis.call('HGET', keys[OWNERS], request) == owner .. '\31' .. attempt
end

-- args: owner, lease, then request and attempt of each claim. Answers the requests that are no longer its own.
local function queue_renew(keys, args)
  local owner, expiry = args[1], whole(now_ms() + tonumber(args[2]))
  local lost = {}
  for index = 3, #args, 2 do
    if owns(keys, owner, args[index], args[index + 1]) then
      redis.call('ZADD', keys[CLAIMS], expiry, args[index])
    else
      lost[#lost + 1] = args[index]
    end
  end
  return lost
end

local function acknowledge(keys, args)
  local owner, request, attempt, tokens = args[1], args[2], args[3], tonumber(args[4])
  if not owns(keys, owner, request, attempt) then
    return {'lost'}
  end
  local place = redis.call('HGET', keys[PLACES], request)
  charge(keys, unpack_place(place).tenant, tokens)
  forget(keys, request, place)
  return {'acknowledged'}
end

-- args: owner, channel, then request and attempt of each claim. They stand again where they stood before.
local function give_back(keys, args)
  local owner, channel = args[1], args[2]
  local lost = {}
  for index = 3, #args, 2 do
    local request = args[index]
    if owns(keys, owner, request, args[index + 1]) then
      local text = redis.call('HGET', keys[PLACES], request)
      local place = unpack_place(text)
      redis.call('HDEL', keys[OWNERS], request)
      redis.call('ZREM', keys[CLAIMS], request)
      redis.call('ZADD', keys[LINE], 0, text)
      redis.call('ZADD', keys[DEADLINES], whole(place.deadline), request)
      take_place_in_turns(keys, place.tenant)
      redis.call('ZINCRBY', keys[TURNS], whole(-place.cost), place.tenant)
    else
      lost[#lost + 1] = request
    end
  end
  redis.call('PUBLISH', channel, '1')
  return lost
end

local function withdraw(keys, args)
  local tenant, request = args[1], args[2]
  local text = redis.call('HGET', keys[PLACES], request)
  if not text or redis.call('HEXISTS', keys[OWNERS], request) == 1 then
    return {'absent'}
  end
  if unpack_place(text).tenant ~= tenant then
    return {'absent'}
  end
  forget(keys, request, text)
  leave_turns_if_done(keys, tenant)
  return {'withdrawn'}
end

-- args: limit, whether lapsed claims may be taken (1) or only requests past their deadline (0), and whether
-- all claims and requests count as lapsed (1), because nobody is alive who could have them.
-- Each answer is owner, attempt, payload; attempt 0 and no owner for one that was never claimed.
local function queue_expire(keys, args)
  local limit, claims_too = args[1], args[2] == '1'
  local now = args[3] == '1' and '+inf' or whole(now_ms())
  local expired = {}
  for _, request in ipairs(redis.call('ZRANGEBYSCORE', keys[DEADLINES], '-inf', now, 'LIMIT', 0, limit)) do
    local text = redis.call('HGET', keys[PLACES], request)
    expired[#expired + 1] = {'', 0, redis.call('HGET', keys[JOBS], request) or ''}
    forget(keys, request, text or '')
    if text then
      leave_turns_if_done(keys, unpack_place(text).tenant)
    end
  end
  if not claims_too then
    return expired
  end
  for _, request in ipairs(redis.call('ZRANGEBYSCORE', keys[CLAIMS], '-inf', now, 'LIMIT', 0, limit)) do
    local owner, attempt = string.match(redis.call('HGET', keys[OWNERS], request) or '\0310', '^([^\31]*)\31(%d+)$')
    expired[#expired + 1] = {owner, tonumber(attempt), redis.call('HGET', keys[JOBS], request) or ''}
    forget(keys, request, redis.call('HGET', keys[PLACES], request) or '')
  end
  return expired
end

register('queue_publish', publish)
register('queue_claim', claim, {'allow-oom'})
register('queue_renew', queue_renew, {'allow-oom'})
register('queue_acknowledge', acknowledge, {'allow-oom'})
register('queue_give_back', give_back, {'allow-oom'})
register('queue_withdraw', withdraw, {'allow-oom'})
register('queue_expire', queue_expire, {'allow-oom'})
