-- The queue of one model. Requests of one tenant wait in order of arrival; between tenants the one that has
-- received the fewest tokens is served first. Counts and times here are no money and fit a double exactly.
--
-- keys: 1 jobs (request to payload), 2 line (places of waiting requests, in lexical order), 3 places (request
-- to place, also while claimed), 4 turns (tenants with waiting requests by tokens received), 5 served (the
-- same count of tenants with nothing waiting), 6 deadlines, 7 claims (by expiry of the lease), 8 owners
-- (request to owner and attempt), 9 meta (seq, floor, last, gap), 10 orphans (requests that lost their worker, by the
-- time at which they did), 11 trials (owner to the request that it tries out).
--
-- A request whose worker is lost becomes an orphan: whoever claims next takes it over, before any that waits. Its attempt
-- counts every claim and is the fence; its losses count the workers that were lost with it, of which it may have few.
-- What has a loss is tried out before it runs beside others, one at a time: if the worker is lost during that, it is the
-- loss of this one alone.

local JOBS, LINE, PLACES, TURNS, SERVED, DEADLINES, CLAIMS, OWNERS, META, ORPHANS, TRIALS =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
-- One tenant may fill at most eight times the places that are still free, so that the last ninth of a queue
-- is there for the others.
local SHARE = 8
local RETRY_MS_MIN, RETRY_MS_MAX, RETRY_MS_UNKNOWN = 100, 10000, 1000
local LATE_MS_MAX = 60000

local function pack_place(place)
  return table.concat({
    place.tenant, string.format('%016.0f', place.seq), whole(place.attempt), whole(place.cost),
    whole(place.deadline), whole(place.losses), whole(place.shun_until), place.shun, place.request,
  }, '\31')
end

local function unpack_place(text)
  local tenant, seq, attempt, cost, deadline, losses, shun_until, shun, request =
    string.match(text, '^([^\31]*)\31(%d+)\31(%d+)\31(%d+)\31(%d+)\31(%d+)\31(%d+)\31([^\31]*)\31(.*)$')
  return {
    tenant = tenant, seq = tonumber(seq), attempt = tonumber(attempt), cost = tonumber(cost),
    deadline = tonumber(deadline), losses = tonumber(losses), shun_until = tonumber(shun_until), shun = shun,
    request = request,
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
  redis.call('ZREM', keys[ORPHANS], request)
end

local function owner_of(keys, request)
  return string.match(redis.call('HGET', keys[OWNERS], request) or '', '^([^\31]*)\31(%d+)$')
end

local function trial_of(keys, owner)
  return string.match(owner and redis.call('HGET', keys[TRIALS], owner) or '', '^%d+\31(.*)$') or ''
end

-- Whether the loss of a worker may have been the request's doing: not while it tried out another.
local function is_suspect(keys, trial, request)
  return trial == '' or trial == request or redis.call('HEXISTS', keys[PLACES], trial) == 0
end

-- What has lost its worker may be taken over until its deadline. One that has lost as many as it may is past it at once.
-- One that was only passed on, because its edge was out of reach, has no more time than before.
local function orphan(keys, place, now, takeover_ms, losses_max, how, trial)
  local request = place.request
  if how == 'lost' and is_suspect(keys, trial, request) then
    place.losses = place.losses + 1
  end
  local deadline = now + takeover_ms
  if place.losses >= losses_max then
    deadline = now
  elseif how == 'passed_on' then
    deadline = math.min(place.deadline, deadline)
  end
  place.deadline = deadline
  redis.call('HSET', keys[PLACES], request, pack_place(place))
  redis.call('ZREM', keys[CLAIMS], request)
  redis.call('ZADD', keys[ORPHANS], whole(now), request)
  redis.call('ZADD', keys[DEADLINES], whole(place.deadline), request)
end

-- Those whose lease ran out, a bounded number at a time. Their owners may come back before somebody takes them over.
local function orphan_lapsed(keys, now, limit, takeover_ms, losses_max, channel)
  local lapsed = redis.call('ZRANGEBYSCORE', keys[CLAIMS], '-inf', whole(now), 'LIMIT', 0, limit)
  if #lapsed > 0 then
    redis.call('PUBLISH', channel, '1')
  end
  for _, request in ipairs(lapsed) do
    local text = redis.call('HGET', keys[PLACES], request)
    if text then
      orphan(keys, unpack_place(text), now, takeover_ms, losses_max, 'lost', trial_of(keys, owner_of(keys, request)))
    else
      redis.call('ZREM', keys[CLAIMS], request)
    end
  end
end

-- About how long until an eighth of a full queue has been claimed, at the pace of late.
local function retry_ms(keys, depth_max)
  local gap = tonumber(redis.call('HGET', keys[META], 'gap') or '')
  if not gap then
    return RETRY_MS_UNKNOWN
  end
  return math.floor(math.min(RETRY_MS_MAX, math.max(RETRY_MS_MIN, gap * depth_max / SHARE)))
end

-- The pace is the time between claims while some waited for them: without that, it is the pace of those who ask.
local function note_pace(keys, claimed, now)
  local past = redis.call('HMGET', keys[META], 'last', 'gap', 'waited', 'pause')
  if past[1] and past[3] == '1' then
    local pause = math.max(0, now - tonumber(past[1]))
    local mean = function(before, value)
      return string.format('%.3f', before and (0.75 * tonumber(before) + 0.25 * value) or value)
    end
    redis.call('HSET', keys[META], 'gap', mean(past[2], pause / claimed), 'pause', mean(past[4], pause))
  end
  local waits = redis.call('ZCARD', keys[LINE]) > 0 and '1' or '0'
  redis.call('HSET', keys[META], 'last', whole(now), 'waited', waits, 'claimed', claimed)
end

-- In how long a request of the tenant that comes now would be begun, at the pace of late.
-- Tenants take turns, so that nobody waits for more of the others than for as many of each as it has itself.
local function start_ms(keys, tenant, now)
  local past = redis.call('HMGET', keys[META], 'last', 'gap', 'waited', 'pause', 'claimed')
  local gap, pause, since = tonumber(past[2] or ''), tonumber(past[4] or ''), 0
  if past[3] == '1' then
    since = math.max(0, now - tonumber(past[1]))
  end
  if not gap then
    gap = since / math.max(1, tonumber(past[5] or '1'))
  elseif since > 2 * pause then
    -- It takes them longer than it used to.
    gap = gap * since / math.max(1, 2 * pause)
  end
  local tenants = redis.call('ZCARD', keys[TURNS])
  if not redis.call('ZSCORE', keys[TURNS], tenant) then
    tenants = tenants + 1
  end
  local ahead = math.min(redis.call('ZCARD', keys[LINE]), (waiting_of(keys, tenant) + 1) * tenants - 1)
  return ahead * gap
end

local function publish(keys, args)
  local request, tenant, payload, cost = args[1], args[2], args[3], tonumber(args[4])
  local wait_ms, depth_max, channel, start_ms_max = tonumber(args[5]), tonumber(args[6]), args[7], tonumber(args[8])
  if redis.call('HEXISTS', keys[JOBS], request) == 1 then
    return {'published'}
  end
  local free = depth_max - redis.call('ZCARD', keys[LINE])
  if free <= 0 or waiting_of(keys, tenant) >= SHARE * free then
    return {'full', retry_ms(keys, depth_max)}
  end
  local now = now_ms()
  local start = start_ms(keys, tenant, now)
  if start > start_ms_max then
    -- When it would be begun in time.
    return {'full', math.floor(math.min(LATE_MS_MAX, math.max(RETRY_MS_MIN, start - start_ms_max)))}
  end
  local deadline = now + wait_ms
  local seq = redis.call('HINCRBY', keys[META], 'seq', 1)
  local place = pack_place{
    tenant = tenant, seq = seq, attempt = 0, cost = cost, deadline = deadline, losses = 0, shun_until = 0, shun = '',
    request = request,
  }
  redis.call('HSET', keys[JOBS], request, payload)
  redis.call('HSET', keys[PLACES], request, place)
  redis.call('ZADD', keys[LINE], 0, place)
  redis.call('ZADD', keys[DEADLINES], whole(deadline), request)
  take_place_in_turns(keys, tenant)
  redis.call('PUBLISH', channel, '1')
  return {'published'}
end

-- Makes a request its claimer's: what the claimer gets of it.
local function hand_over(keys, place, owner, expiry)
  local request = place.request
  local payload = redis.call('HGET', keys[JOBS], request)
  place.attempt = place.attempt + 1
  redis.call('HSET', keys[PLACES], request, pack_place(place))
  redis.call('HSET', keys[OWNERS], request, owner .. '\31' .. whole(place.attempt))
  redis.call('ZADD', keys[CLAIMS], expiry, request)
  redis.call('ZREM', keys[DEADLINES], request)
  redis.call('ZREM', keys[ORPHANS], request)
  return {request, place.attempt, place.losses, payload}
end

-- Orphans that one call looks at.
local ORPHANS_LOOKED_AT = 256

local function adopt(keys, claims, owner, room, expiry, now)
  for _, request in ipairs(redis.call('ZRANGE', keys[ORPHANS], 0, ORPHANS_LOOKED_AT - 1)) do
    if #claims >= room then
      return
    end
    local text = redis.call('HGET', keys[PLACES], request)
    local place = text and unpack_place(text)
    local is_shunned = place and place.shun == owner and place.shun_until > now
    if not place or redis.call('HEXISTS', keys[JOBS], request) == 0 then
      forget(keys, request, text or '')
    elseif place.deadline > now and not is_shunned then
      claims[#claims + 1] = hand_over(keys, place, owner, expiry)
    end
  end
end

-- args: owner, how many orphans and how many others it has room for, lease.
local function claim(keys, args)
  local owner, room_to_adopt, room, lease_ms = args[1], tonumber(args[2]), tonumber(args[3]), tonumber(args[4])
  local now = now_ms()
  local expiry = whole(now + lease_ms)
  local claims = {}
  adopt(keys, claims, owner, room_to_adopt, expiry, now)
  local adopted = #claims
  while #claims - adopted < room do
    local tenant = redis.call('ZRANGE', keys[TURNS], 0, 0)[1]
    if not tenant then
      break
    end
    local first =
      redis.call('ZRANGEBYLEX', keys[LINE], '[' .. tenant .. '\31', '(' .. tenant .. '\32', 'LIMIT', 0, 1)[1]
    if first then
      local place = unpack_place(first)
      redis.call('ZREM', keys[LINE], first)
      -- One that is past its deadline is not served late: it keeps its deadline, by which it will be expired.
      if place.deadline > now and redis.call('HEXISTS', keys[JOBS], place.request) == 1 then
        charge(keys, tenant, place.cost)
        claims[#claims + 1] = hand_over(keys, place, owner, expiry)
      end
    end
    leave_turns_if_done(keys, tenant)
  end
  if #claims > adopted then
    note_pace(keys, #claims - adopted, now)
  end
  return claims
end

local function owns(keys, owner, request, attempt)
  return redis.call('HGET', keys[OWNERS], request) == owner .. '\31' .. attempt
end

-- Whether the store has lost a claim of this attempt: nobody has the request, and nobody had a later one.
local function is_gone(keys, request, attempt)
  local place = redis.call('HGET', keys[PLACES], request)
  return not place
    or redis.call('HEXISTS', keys[OWNERS], request) == 0 and unpack_place(place).attempt < tonumber(attempt)
end

-- args: owner, lease, then request and attempt of each claim. Answers the requests that are no longer its own, and those
-- of which the store has lost that they are.
local function queue_renew(keys, args)
  local owner, expiry = args[1], whole(now_ms() + tonumber(args[2]))
  local lost, gone = {}, {}
  for index = 3, #args, 2 do
    local request = args[index]
    if owns(keys, owner, request, args[index + 1]) then
      -- Late, but nobody has taken it over.
      if redis.call('ZREM', keys[ORPHANS], request) == 1 then
        local place = unpack_place(redis.call('HGET', keys[PLACES], request))
        place.losses = math.max(0, place.losses - 1)
        redis.call('HSET', keys[PLACES], request, pack_place(place))
        redis.call('ZREM', keys[DEADLINES], request)
      end
      redis.call('ZADD', keys[CLAIMS], expiry, request)
    elseif is_gone(keys, request, args[index + 1]) then
      gone[#gone + 1] = request
    else
      lost[#lost + 1] = request
    end
  end
  return {lost, gone}
end

-- A claim that the store has lost, and that its owner still works on. args: owner, lease, request, attempt, tenant,
-- payload, cost.
local function restore(keys, args)
  local owner, request, attempt, tenant = args[1], args[3], args[4], args[5]
  if not is_gone(keys, request, attempt) then
    return {owns(keys, owner, request, attempt) and 'restored' or 'lost'}
  end
  local text = redis.call('HGET', keys[PLACES], request)
  if text then
    forget(keys, request, text)
    leave_turns_if_done(keys, tenant)
  end
  redis.call('HSET', keys[JOBS], request, args[6])
  hand_over(keys, {
    tenant = tenant, seq = redis.call('HINCRBY', keys[META], 'seq', 1), attempt = tonumber(attempt) - 1,
    cost = tonumber(args[7]), deadline = 0, losses = 0, shun_until = 0, shun = '', request = request,
  }, owner, whole(now_ms() + tonumber(args[2])))
  return {'restored'}
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

-- args: owner, channel, how long the owner shall not get them again, whether they are lost, passed_on or handed_over, how
-- long an orphan waits, how many losses end a request, what was tried out, then request and attempt of each claim. All
-- become orphans.
local function give_back(keys, args)
  local owner, channel, shun_ms, how = args[1], args[2], tonumber(args[3]), args[4]
  local takeover_ms, losses_max, trial = tonumber(args[5]), tonumber(args[6]), args[7]
  local lost, now = {}, now_ms()
  for index = 8, #args, 2 do
    local request = args[index]
    if owns(keys, owner, request, args[index + 1]) then
      local place = unpack_place(redis.call('HGET', keys[PLACES], request))
      place.shun, place.shun_until = owner, now + shun_ms
      redis.call('HDEL', keys[OWNERS], request)
      orphan(keys, place, now, takeover_ms, losses_max, how, trial)
    else
      lost[#lost + 1] = request
    end
  end
  redis.call('PUBLISH', channel, '1')
  return lost
end

-- Somebody who must know says that the worker of this attempt is lost. args: request, attempt, channel, how long an
-- orphan waits, how many losses end a request. Answers whether it is one now, is with somebody else, or is not here.
local function disown(keys, args)
  local request, attempt, now = args[1], args[2], now_ms()
  local text = redis.call('HGET', keys[PLACES], request)
  if not text then
    return {'absent'}
  end
  local owner, of = owner_of(keys, request)
  if of ~= attempt then
    return {'elsewhere'}
  end
  -- Its owner does not get it back by renewing.
  redis.call('HDEL', keys[OWNERS], request)
  if not redis.call('ZSCORE', keys[ORPHANS], request) then
    orphan(keys, unpack_place(text), now, tonumber(args[4]), tonumber(args[5]), 'lost', trial_of(keys, owner))
  end
  redis.call('PUBLISH', args[3], '1')
  return {'disowned'}
end

-- args: owner, the request that it tries out from now on, '' for none.
local function try_out(keys, args)
  if args[2] == '' then
    redis.call('HDEL', keys[TRIALS], args[1])
  else
    redis.call('HSET', keys[TRIALS], args[1], whole(now_ms()) .. '\31' .. args[2])
  end
  return {'noted'}
end

-- One that takes longer is over, as is that of an owner who is gone.
local TRIAL_MS_MAX = 120000

local function forget_old_trials(keys, now)
  local trials = redis.call('HGETALL', keys[TRIALS])
  for index = 1, #trials, 2 do
    if tonumber(string.match(trials[index + 1], '^%d+')) + TRIAL_MS_MAX < now then
      redis.call('HDEL', keys[TRIALS], trials[index])
    end
  end
end

local function withdraw(keys, args)
  local tenant, request = args[1], args[2]
  local text = redis.call('HGET', keys[PLACES], request)
  if not text or unpack_place(text).attempt > 0 then
    return {'absent'}
  end
  if unpack_place(text).tenant ~= tenant then
    return {'absent'}
  end
  forget(keys, request, text)
  leave_turns_if_done(keys, tenant)
  return {'withdrawn'}
end

-- args: limit, whether leases may have run out (1), how long an orphan waits, how many losses end a request, whether all
-- is over (1), because nobody is alive who could have any of it, and the channel of those who claim.
-- Takes out what is past its deadline: owner ('' for none), attempt (0 for what was never claimed), losses, payload.
local function queue_expire(keys, args)
  local limit, now, all = args[1], now_ms(), args[5] == '1'
  if args[2] == '1' then
    orphan_lapsed(keys, now, limit, tonumber(args[3]), tonumber(args[4]), args[6])
    forget_old_trials(keys, now)
  end
  local until_when = all and '+inf' or whole(now)
  local over = redis.call('ZRANGEBYSCORE', keys[DEADLINES], '-inf', until_when, 'LIMIT', 0, limit)
  for _, request in ipairs(all and redis.call('ZRANGEBYSCORE', keys[CLAIMS], '-inf', '+inf', 'LIMIT', 0, limit) or {}) do
    over[#over + 1] = request
  end
  local expired = {}
  for _, request in ipairs(over) do
    local text = redis.call('HGET', keys[PLACES], request)
    local owner = owner_of(keys, request)
    local place = text and unpack_place(text) or {attempt = 0, losses = 0}
    expired[#expired + 1] = {owner or '', place.attempt, place.losses, redis.call('HGET', keys[JOBS], request) or ''}
    forget(keys, request, text or '')
    if text then
      leave_turns_if_done(keys, place.tenant)
    end
  end
  return expired
end

register('queue_publish', publish)
register('queue_claim', claim, {'allow-oom'})
register('queue_renew', queue_renew, {'allow-oom'})
register('queue_restore', restore, {'allow-oom'})
register('queue_acknowledge', acknowledge, {'allow-oom'})
register('queue_give_back', give_back, {'allow-oom'})
register('queue_disown', disown, {'allow-oom'})
register('queue_try_out', try_out, {'allow-oom'})
register('queue_withdraw', withdraw, {'allow-oom'})
register('queue_expire', queue_expire, {'allow-oom'})
