-- Where a tenant's events go, and their delivery: one at a time, in order, by one node at a time.
--
-- keys: those of the ledger (see common.lua). Beside them the hash `webhook`: url, kinds, enabled, secret,
-- secret_before and until when it signs too (secret_until), created, changed; of the event at the head of the outbox
-- `trying` (its id), attempts, first_at, next_at, and leased_until while a node delivers it; of the past delivered_at,
-- failed_at, why. Each lease has a number of its own (the account's field `hook_fence`), and who comes back without
-- the last one changes nothing.

local OF_HEAD = {'trying', 'attempts', 'first_at', 'next_at', 'leased_until'}

local function event_id(event)
  return cjson.decode(event).id
end

-- Makes or changes an endpoint; what is '' stays. Arguments: url, kinds, enabled ('1' or '0'), a fresh secret, whether
-- it is to replace the one there is ('1' or '0'), and how long that one signs as well, in ms.
local function webhook_set(keys, args)
  local ask = named(args, {'url', 'kinds', 'enabled', 'secret', 'rotate', 'grace_ms'})
  if redis.call('EXISTS', keys[ACCOUNT]) == 0 then
    return {'unknown_tenant'}
  end
  local webhook, now = beside(keys, 'webhook'), now_ms()
  local old = redis.call('HMGET', webhook, 'url', 'kinds', 'enabled', 'secret')
  if not old[1] and ask.url == '' then
    return {'absent'}
  end
  local kinds = ask.kinds ~= '' and ask.kinds or old[2]
  local enabled = ask.enabled ~= '' and ask.enabled or old[3] or '1'
  local done = 'kept'
  if not old[1] then
    redis.call('HSET', webhook, 'secret', ask.secret, 'created', whole(now))
    done = 'made'
  elseif ask.rotate == '1' then
    redis.call('HSET', webhook, 'secret', ask.secret, 'secret_before', old[4],
      'secret_until', whole(now + tonumber(ask.grace_ms)))
    done = 'rotated'
  end
  redis.call('HSET', webhook, 'url', ask.url ~= '' and ask.url or old[1], 'kinds', kinds, 'enabled', enabled,
    'changed', whole(now))
  -- What failed is tried at once: it may well be why something was changed.
  redis.call('HDEL', webhook, 'next_at')
  redis.call('HSET', keys[ACCOUNT], 'hook', enabled == '1' and kinds or '')
  watch_balance(keys)
  redis.call('PUBLISH', OUTBOX_CHANNEL, keys[ACCOUNT])
  return {done}
end

-- The endpoint, how many events wait, and how many dead letters there are, all at one instant.
local function webhook_show(keys)
  return {
    'shown', redis.call('HGETALL', beside(keys, 'webhook')), redis.call('LLEN', beside(keys, 'outbox')),
    redis.call('LLEN', beside(keys, 'dead')),
  }
end

-- With all that waits, and all dead letters.
local function webhook_remove(keys)
  local removed = redis.call('DEL', beside(keys, 'webhook'))
  redis.call('DEL', beside(keys, 'outbox'), beside(keys, 'dead'))
  redis.call('HDEL', keys[ACCOUNT], 'hook', 'low_told', 'exhausted_told')
  return {removed == 1 and 'removed' or 'absent'}
end

-- The next event, for whoever delivers it within `lease_ms`; or in how many ms to ask again. Counts the attempt, so
-- that one during which the node died counts as well.
local function webhook_take(keys, args)
  local webhook, now = beside(keys, 'webhook'), now_ms()
  local state = redis.call('HMGET', webhook, 'url', 'enabled', 'secret', 'secret_before', 'secret_until', unpack(OF_HEAD))
  local url, enabled, secret, secret_before, secret_until = unpack(state, 1, 5)
  local trying, next_at, leased_until = state[6], tonumber(state[9] or '0'), tonumber(state[10] or '0')
  if not url or enabled ~= '1' then
    return {'idle'}
  end
  local event = redis.call('LINDEX', beside(keys, 'outbox'), 0)
  if not event then
    return {'idle'}
  end
  if leased_until > now then
    return {'later', whole(leased_until - now)}
  end
  local id = event_id(event)
  if trying ~= id then
    redis.call('HDEL', webhook, unpack(OF_HEAD))
    redis.call('HSET', webhook, 'trying', id, 'first_at', whole(now))
  elseif next_at > now then
    return {'later', whole(next_at - now)}
  end
  local attempts = redis.call('HINCRBY', webhook, 'attempts', 1)
  redis.call('HSET', webhook, 'leased_until', whole(now + tonumber(args[1])))
  local fence = redis.call('HINCRBY', keys[ACCOUNT], 'hook_fence', 1)
  if not secret_before or tonumber(secret_until) <= now then
    secret_before = ''
  end
  return {'event', whole(fence), id, event, attempts, whole(now), url, secret, secret_before}
end

-- Whether the event that was taken under this lease still stands at the head.
local function stands(keys, fence, id)
  if redis.call('HGET', keys[ACCOUNT], 'hook_fence') ~= fence then
    return false
  end
  local event = redis.call('LINDEX', beside(keys, 'outbox'), 0)
  return event and event_id(event) == id
end

-- Arguments: the lease's number, the event's id.
local function webhook_done(keys, args)
  if not stands(keys, args[1], args[2]) then
    return {'lost'}
  end
  local webhook = beside(keys, 'webhook')
  redis.call('LPOP', beside(keys, 'outbox'))
  redis.call('HDEL', webhook, 'failed_at', 'why', unpack(OF_HEAD))
  redis.call('HSET', webhook, 'delivered_at', whole(now_ms()))
  return {'done'}
end

-- The attempt failed: another one after `delay_ms`, unless it was the last. Arguments as named.
local function webhook_failed(keys, args)
  local ask = named(args, {'fence', 'id', 'why', 'delay_ms', 'attempts_max', 'age_ms_max'})
  if not stands(keys, ask.fence, ask.id) then
    return {'lost'}
  end
  local webhook, now = beside(keys, 'webhook'), now_ms()
  local state = redis.call('HMGET', webhook, 'attempts', 'first_at')
  redis.call('HSET', webhook, 'failed_at', whole(now), 'why', ask.why)
  if tonumber(state[1]) >= tonumber(ask.attempts_max) or now - tonumber(state[2]) >= tonumber(ask.age_ms_max) then
    bury(keys, redis.call('LPOP', beside(keys, 'outbox')), state[1], ask.why)
    redis.call('HDEL', webhook, unpack(OF_HEAD))
    return {'dead'}
  end
  redis.call('HDEL', webhook, 'leased_until')
  redis.call('HSET', webhook, 'next_at', whole(now + tonumber(ask.delay_ms)))
  return {'later', ask.delay_ms}
end

-- Takes dead letters away: back into the outbox ('retry') or for good ('drop'). Arguments: which of the two, and an
-- event's id ('' for all of them).
local function webhook_dead(keys, args)
  local action, wanted, dead = args[1], args[2], beside(keys, 'dead')
  if action == 'retry' and redis.call('EXISTS', beside(keys, 'webhook')) == 0 then
    return {'absent'}
  end
  local taken = {}
  for _, letter in ipairs(redis.call('LRANGE', dead, 0, -1)) do
    local event = cjson.decode(letter).event
    if wanted == '' or event_id(event) == wanted then
      redis.call('LREM', dead, 1, letter)
      taken[#taken + 1] = event
    end
  end
  if action == 'retry' then
    for _, event in ipairs(taken) do
      put_out(keys, event)
    end
  end
  return {'taken', #taken}
end

register('webhook_set', webhook_set)
register('webhook_show', webhook_show, {'no-writes'})
register('webhook_remove', webhook_remove)
register('webhook_take', webhook_take)
register('webhook_done', webhook_done)
register('webhook_failed', webhook_failed)
register('webhook_dead', webhook_dead)
