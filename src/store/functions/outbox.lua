-- What a tenant is told of outside: events, which wait in its outbox until they are delivered. The account's field
-- `hook` names the kinds that its endpoint wants (see webhooks.lua). For all others nothing is written, not even
-- that they were told: who makes an endpoint hears of what still holds.
--
-- An event is a flat table of texts: id, kind, at, the balance and what is on hold, and what belongs to its kind.

local OUTBOX_MAX, DEAD_MAX = 1000, 1000

local function wants(hook, kind)
  return hook and string.find(',' .. hook .. ',', ',' .. kind .. ',', 1, true) ~= nil
end

-- Among the dead letters: an event that is not delivered unless somebody asks for it.
local function bury(keys, event, attempts, why)
  local dead = beside(keys, 'dead')
  redis.call('RPUSH', dead, cjson.encode({event = event, attempts = attempts, why = why, at = whole(now_ms())}))
  redis.call('LTRIM', dead, -DEAD_MAX, -1)
end

-- A full outbox gives up what has waited longest.
local function put_out(keys, event)
  local outbox = beside(keys, 'outbox')
  if redis.call('RPUSH', outbox, event) > OUTBOX_MAX then
    bury(keys, redis.call('LPOP', outbox), '0', 'too many events waited')
  end
  redis.call('PUBLISH', OUTBOX_CHANNEL, keys[ACCOUNT])
end

local function tell_outside(keys, kind, facts)
  local money = redis.call('HMGET', keys[ACCOUNT], 'balance', 'held')
  facts.id = whole(redis.call('HINCRBY', keys[ACCOUNT], 'events', 1))
  facts.kind, facts.at, facts.balance, facts.held = kind, whole(now_ms()), money[1], money[2]
  put_out(keys, cjson.encode(facts))
end

-- Once when less is left than the tenant wants to have, and again only after there was more. What is on hold is still
-- left: or every request near the mark would cross it twice. `more`: money has come that was not there before.
local function watch_balance(keys, more)
  if more then
    redis.call('HDEL', keys[ACCOUNT], 'exhausted_told')
  end
  local state = redis.call('HMGET', keys[ACCOUNT], 'hook', 'low', 'low_told', 'available', 'held')
  local low = state[2]
  if not low or low == '' or not wants(state[1], 'balance.low') then
    return
  end
  local is_low = tonumber(state[4]) + tonumber(state[5]) < tonumber(low)
  if is_low and state[3] ~= '1' then
    redis.call('HSET', keys[ACCOUNT], 'low_told', '1')
    tell_outside(keys, 'balance.low', {threshold = low})
  elseif not is_low and state[3] == '1' then
    redis.call('HSET', keys[ACCOUNT], 'low_told', '0')
  end
end

-- Once until there is more money: a request got less than it asked for because no more may be spent.
local function tell_exhausted(keys)
  local state = redis.call('HMGET', keys[ACCOUNT], 'hook', 'exhausted_told')
  if state[2] ~= '1' and wants(state[1], 'balance.exhausted') then
    redis.call('HSET', keys[ACCOUNT], 'exhausted_told', '1')
    tell_outside(keys, 'balance.exhausted', {})
  end
end

-- Once in a day or month for each limit of each party, and again where the limit was changed meanwhile. Limits of a
-- minute and of requests at a time are not told: they are met and forgotten within a minute.
local function tell_limit(keys, party, name, day)
  if not wants(redis.call('HGET', keys[ACCOUNT], 'hook'), 'limit.reached') then
    return
  end
  local is_of_month = name == 'spend_per_month'
  local period = is_of_month and string.sub(day, 1, 6) or day
  local of_period = beside(keys, 'period:' .. period)
  local told, limit = 'told:' .. party.who .. ':' .. name, whole(party.limits[name])
  if redis.call('HGET', of_period, told) == limit then
    return
  end
  redis.call('HSET', of_period, told, limit)
  redis.call('EXPIRE', of_period, is_of_month and MONTH_KEPT_SECONDS or DAY_KEPT_SECONDS)
  tell_outside(keys, 'limit.reached', {
    limit = name, limit_value = limit, period = period, scope = party.label,
    key = party.label == 'key' and string.sub(party.who, 3) or nil,
  })
end

-- What kept a request from the money that it asked for.
local function tell_in_way(keys, by, party, name, day)
  if by == 'balance' then
    tell_exhausted(keys)
  elseif by == 'spend' then
    tell_limit(keys, party, name, day)
  end
end
