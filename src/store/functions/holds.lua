-- Holds: money set aside for a request, from its admission to its settlement or release.

-- Of `wanted` tokens at `price`, as many as the room that limits of spend leave and what may be spent pay for
-- beside `fixed`; how much that is, and what was in the way of more.
local function affordable(account, room, fixed, price, wanted)
  local tokens, by = wanted, ''
  local function fit(money, name)
    local cost = fixed + tokens * price
    -- What is free needs no money, not even that of somebody who owes some.
    if cost > money and cost > 0 then
      tokens, by = price > 0 and math.floor((money - fixed) / price) or -1, name
    end
  end
  if room then
    fit(room, 'spend')
  end
  fit(tonumber(account.available), 'balance')
  return tokens, whole(fixed + math.max(tokens, 0) * price), by
end

local function close_count(keys, key)
  if redis.call('HINCRBY', keys[OPEN], key, -1) <= 0 then
    redis.call('HDEL', keys[OPEN], key)
  end
end

-- Takes an open hold off the books, and leaves its money in nobody's hands: the caller books it at once.
-- Answers false if the account does not have as much on hold.
local function close_hold(keys, request, held, outcome, key)
  if redis.call('HINCRBY', keys[ACCOUNT], 'held', minus(held)) < 0 then
    redis.call('HINCRBY', keys[ACCOUNT], 'held', held)
    return false
  end
  redis.call('HDEL', keys[HOLDS], request)
  redis.call('HDEL', keys[TERMS], request)
  redis.call('ZREM', keys[LEASES], request)
  redis.call('HSET', keys[ENDED], request, outcome)
  close_count(keys, key)
  return true
end

local function less_held_than_open(keys)
  return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' has less on hold than its open holds')
end

local function release_one(keys, tenant, request, reason)
  local held = redis.call('HGET', keys[HOLDS], request)
  if not held then
    return false
  end
  local entry, behind = unpack_terms(redis.call('HGET', keys[TERMS], request) or '')
  -- Its entry is the next one.
  local seq = whole(tonumber(redis.call('HGET', keys[ACCOUNT], 'seq')) + 1)
  if not close_hold(keys, request, held, 'release ' .. reason .. ' ' .. seq, entry.key) then
    return less_held_than_open(keys)
  end
  move_balance(keys, held)
  rate_give_back(keys[RATES], request, 0)
  count_tokens(keys, entry.key, behind.day, -tonumber(behind.tokens))
  count_spend(keys, entry.key, behind.day, minus(held))
  entry.kind, entry.request, entry.tenant, entry.amount, entry.note = 'release', request, tenant, held, reason
  entry.hold = held
  append(keys, entry)
  watch_balance(keys)
  return true
end

local function release_expired(keys, tenant, limit, until_ms)
  local expired = redis.call('ZRANGEBYSCORE', keys[LEASES], '-inf', until_ms, 'LIMIT', 0, limit)
  local released = 0
  for _, request in ipairs(expired) do
    local done = release_one(keys, tenant, request, 'expired')
    if type(done) == 'table' then
      return done
    end
    if done then
      released = released + 1
    else
      redis.call('ZREM', keys[LEASES], request)
    end
  end
  return nil, released, #expired
end

local HOLD_ARGS = {
  'tenant', 'request', 'lease_ms', 'key', 'model', 'prompt', 'wanted', 'output_max', 'choices', 'input', 'output',
  'cached_input', 'version', 'tier',
}

-- Admission: all or nothing. After the named arguments come the limits of the tier, in the order of `LIMITS`.
-- A refusal names what is in the way; every answer ends with what is left of the rates.
local function hold(keys, args)
  local ask = named(args, HOLD_ARGS)
  local account, refusal = known(keys)
  if refusal then
    return refusal
  end
  local state = redis.call('HMGET', keys[ACCOUNT], 'status', 'tier', unpack(LIMIT_FIELDS))
  if state[1] ~= 'active' then
    return {'suspended'}
  end
  if (state[2] or '') ~= ask.tier then
    return {'tier', state[2] or ''}
  end
  local now = now_ms()
  local record = redis.call('HMGET', beside(keys, 'key:' .. ask.key), 'status', 'expires', unpack(LIMIT_FIELDS))
  if record[1] ~= 'active' or (record[2] and record[2] ~= '' and tonumber(record[2]) <= now) then
    return {'key_ended'}
  end
  local tier, own, of_key = {}, {}, {}
  for index = 1, #LIMITS do
    tier[index], own[index], of_key[index] = args[#HOLD_ARGS + index], state[2 + index], record[2 + index]
  end
  local tenant_of_tier, bad_tier = limits_from(tier)
  local tenant_limits, bad = limits_from(own, tier)
  local key_limits, bad_of_key = limits_from(of_key)
  if bad_tier or bad or bad_of_key then
    return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' has no sound limit ' .. (bad or bad_of_key or bad_tier))
  end
  if redis.call('HEXISTS', keys[HOLDS], ask.request) == 1 or redis.call('HEXISTS', keys[ENDED], ask.request) == 1 then
    return {'repeated'}
  end
  local prompt, wanted, choices = tonumber(ask.prompt), tonumber(ask.wanted), tonumber(ask.choices)
  local input, output, tokens = tonumber(ask.input), tonumber(ask.output), prompt + tonumber(ask.output_max)
  if prompt * input + wanted * output > EXACT_MAX then
    return {'overflow'}
  end

  -- By the clock as it is. Entries never go back behind earlier ones; where that makes a day's difference, they say so.
  local day = day_name(now)
  local parties = parties_of(keys, ask.key, tenant_limits, key_limits, day)
  local windows, overrun = rate_windows(keys, parties, tokens, now)
  local room, party_in_way, name_in_way = spend_room(parties)
  local paid, amount, by = affordable(account, room, prompt * input, output, wanted)
  if paid < choices then
    tell_in_way(keys, by, party_in_way, name_in_way, day)
    if by == 'balance' then
      return {'insufficient', account.balance, unpack(tell_windows(keys, windows, now))}
    end
    return {
      'limit', name_in_way, party_in_way.label, whole(spend_wait(name_in_way, now)),
      whole(party_in_way.limits[name_in_way]), unpack(tell_windows(keys, windows, now)),
    }
  end
  local crowded = too_many_open(parties)
  if crowded then
    return {
      'limit', 'requests_at_once', crowded.label, whole(CONCURRENT_WAIT_MS), whole(crowded.limits.requests_at_once),
      unpack(tell_windows(keys, windows, now)),
    }
  end
  if overrun then
    -- A request that would never fit says nothing of the day.
    if not overrun.bucket and overrun.amount <= overrun.limit then
      tell_limit(keys, overrun.party, overrun.limit_name, day)
    end
    return {
      'limit', overrun.limit_name, overrun.party.label, whole(window_wait(keys, overrun, now)), whole(overrun.limit),
      unpack(tell_windows(keys, windows, now)),
    }
  end

  if move_balance(keys, minus(amount)) < 0 and amount ~= '0' then
    move_balance(keys, amount)
    return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' had less than was counted on')
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'held', amount)
  redis.call('HSET', keys[HOLDS], ask.request, amount)
  redis.call('HSET', keys[TERMS], ask.request, table.concat({
    pack_terms(ask), day, whole(tokens), whole(tenant_of_tier.spend_per_day), whole(tenant_of_tier.spend_per_month),
    ask.lease_ms,
  }, '\31'))
  redis.call('ZADD', keys[LEASES], whole(now + tonumber(ask.lease_ms)), ask.request)
  redis.call('HINCRBY', keys[OPEN], ask.key, 1)
  count_request(keys, ask.request, parties, windows, tokens, day)
  count_spend(keys, ask.key, day, amount)
  append(keys, {
    kind = 'hold', request = ask.request, tenant = ask.tenant, key = ask.key, model = ask.model, prompt = ask.prompt,
    completion = whole(paid), input = ask.input, output = ask.output, cached_input = ask.cached_input,
    version = ask.version, amount = amount,
    note = day ~= day_name(math.max(now, tonumber(account.at))) and 'day ' .. day or '',
  })
  tell_in_way(keys, by, party_in_way, name_in_way, day)
  return {'held', amount, whole(paid), by, unpack(tell_windows(keys, windows, now))}
end

-- More output tokens for an open hold, at its own terms: as many of `wanted` as there is money for. Arguments:
-- tenant, request, wanted, and how much is on hold for it as far as the caller knows. Answers how many, and what was in
-- the way of more. Those of an earlier call, whose answer was lost, are told again.
local function extend(keys, args)
  local ask = named(args, {'tenant', 'request', 'wanted', 'known'})
  local account, refusal = known(keys)
  if refusal then
    return refusal
  end
  local packed = redis.call('HGET', keys[TERMS], ask.request)
  if not packed or redis.call('HEXISTS', keys[HOLDS], ask.request) == 0 then
    return {'absent'}
  end
  local entry, behind = unpack_terms(packed)
  local price, wanted = tonumber(entry.output), tonumber(ask.wanted)
  if price * wanted > EXACT_MAX then
    return {'overflow'}
  end
  local held = tonumber(redis.call('HGET', keys[HOLDS], ask.request))
  local untold = price > 0 and math.floor((held - tonumber(ask.known)) / price) or 0
  if untold > 0 then
    return {'extended', whole(untold), ''}
  end
  local tier = {}
  for index, name in ipairs(LIMITS) do
    tier[index] = behind[name]
  end
  local tenant_limits = limits_from(redis.call('HMGET', keys[ACCOUNT], unpack(LIMIT_FIELDS)), tier)
  local key_limits = limits_from(redis.call('HMGET', beside(keys, 'key:' .. entry.key), unpack(LIMIT_FIELDS)))
  if not tenant_limits or not key_limits then
    return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' has a limit that is no number')
  end
  -- Of the day that it counts for, which may be over.
  local room, party_in_way, name_in_way =
    spend_room(parties_of(keys, entry.key, tenant_limits, key_limits, behind.day))
  local paid, amount, by = affordable(account, room, 0, price, wanted)
  if paid <= 0 then
    tell_in_way(keys, by, party_in_way, name_in_way, behind.day)
    return {'extended', '0', by}
  end
  if move_balance(keys, minus(amount)) < 0 and amount ~= '0' then
    move_balance(keys, amount)
    return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' had less than was counted on')
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'held', amount)
  redis.call('HINCRBY', keys[HOLDS], ask.request, amount)
  count_spend(keys, entry.key, behind.day, amount)
  entry.kind, entry.request, entry.tenant, entry.amount = 'hold', ask.request, ask.tenant, amount
  entry.completion, entry.note = whole(paid), 'extended'
  append(keys, entry)
  tell_in_way(keys, by, party_in_way, name_in_way, behind.day)
  return {'extended', whole(paid), by}
end

-- From now on only the worker of this attempt, or of a later one, may settle the request. Arguments: tenant, request,
-- attempt. Answers what is on hold, or what became of the request: how many tokens it was charged for.
local function take_over(keys, args)
  local ask = named(args, {'tenant', 'request', 'attempt'})
  local _, refusal = known(keys)
  if refusal then
    return refusal
  end
  local held, packed = redis.call('HGET', keys[HOLDS], ask.request), redis.call('HGET', keys[TERMS], ask.request)
  if held and packed then
    local terms, behind = unpack_terms(packed)
    if tonumber(behind.attempt) > tonumber(ask.attempt) then
      return {'superseded'}
    end
    behind.attempt = ask.attempt
    local values = {pack_terms(terms)}
    for _, name in ipairs(BEHIND_TERMS) do
      values[#values + 1] = behind[name]
    end
    redis.call('HSET', keys[TERMS], ask.request, table.concat(values, '\31'))
    return {'held', held}
  end
  local ended = redis.call('HGET', keys[ENDED], ask.request) or ''
  local seq = string.match(ended, '^post %S+ (%d+)$')
  local posted = seq and redis.call('XRANGE', keys[ENTRIES], seq .. '-0', seq .. '-0')[1]
  if not posted then
    return {'unheld', ended}
  end
  local fields = posted[2]
  for index = 1, #fields, 2 do
    if fields[index] == 'completion' then
      return {'posted', fields[index + 1]}
    end
  end
  return redis.error_reply('DAMAGED ' .. keys[ENTRIES] .. ' has a charge without its tokens')
end

-- Moves what the tenant's own statistics show, by the time of the entry.
local function count_usage(keys, entry)
  local at = tonumber(entry.at)
  local name = entry.model .. '\31' .. entry.key .. '\31'
  local buckets = {
    {beside(keys, 'usage:hour:' .. whole(math.floor(at / 3600000))), USAGE_HOURS_KEPT_SECONDS},
    {beside(keys, 'usage:minute:' .. whole(math.floor(at / 60000))), USAGE_MINUTES_KEPT_SECONDS},
  }
  for _, bucket in ipairs(buckets) do
    local key, kept = bucket[1], bucket[2]
    redis.call('HINCRBY', key, name .. 'requests', '1')
    redis.call('HINCRBY', key, name .. 'prompt', entry.prompt)
    redis.call('HINCRBY', key, name .. 'completion', entry.completion)
    redis.call('HINCRBY', key, name .. 'cached', entry.cached)
    redis.call('HINCRBY', key, name .. 'amount', entry.amount)
    redis.call('EXPIRE', key, kept)
  end
end

-- Takes a charge from the balance; what that cannot pay is written off.
local function collect(keys, account, entry)
  if tonumber(entry.amount) > EXACT_MAX then
    return {'overflow'}
  end
  local available = tonumber(account.available)
  local short = tonumber(entry.amount) - math.max(available, 0)
  if short > 0 then
    local written_off = whole(short)
    if overflows(keys, 'adjusted', written_off) then
      return {'overflow'}
    end
    redis.call('HINCRBY', keys[ACCOUNT], 'adjusted', written_off)
    move_balance(keys, written_off)
    append(keys, {
      kind = 'adjust', request = entry.request, tenant = entry.tenant, amount = written_off, note = 'written_off',
    })
  end
  move_balance(keys, minus(entry.amount))
  entry.hold = '0'
  return nil
end

-- Requests that were asked again under their idempotency keys before they had answered: whatever becomes of them, it is
-- the last of them that is paid for.
local FORGIVEN_SECONDS = 31 * 86400

local function is_forgiven(keys, request)
  return redis.call('EXISTS', beside(keys, 'forgiven:' .. request)) == 1
end

-- Makes a request free, whether it is still to end or has ended. Arguments: tenant, request.
local function forgive(keys, args)
  local ask = named(args, {'tenant', 'request'})
  local _, refusal = known(keys)
  if refusal then
    return refusal
  end
  redis.call('SET', beside(keys, 'forgiven:' .. ask.request), '1', 'EX', FORGIVEN_SECONDS)
  local released = release_one(keys, ask.tenant, ask.request, 'asked_again')
  if type(released) == 'table' then
    return released
  end
  local charged = string.match(redis.call('HGET', keys[ENDED], ask.request) or '', '^post (%d+) ')
  local left = redis.call('HGET', keys[ENDED], 'refundable ' .. ask.request) or charged
  if left and left ~= '0' then
    return refund(keys, {ask.tenant, 'asked_again ' .. ask.request, left, 'asked_again', ask.request})
  end
  return {released and 'released' or 'free'}
end

-- Whoever had a request that was released for this could not say what it used.
local LATE_AFTER = {expired = true, worker_lost = true}
local LATE_MS_MAX = 30 * DAY_MS
-- Requests are named by edges, whose clocks may be off by so much.
local CLOCKS_OFF_MS = 3600000

-- A request whose hold was given up before it was known what it used: charged to the balance, and what that cannot
-- pay is written off.
local function post_late(keys, account, entry)
  local ended = redis.call('HGET', keys[ENDED], entry.request) or ''
  local reason, seq = string.match(ended, '^release (%S+) (%d+)$')
  if ended == '' then
    -- A store that died may have lost the hold with its last second. Whoever began the request knows its terms. What
    -- is older than the archive was forgotten on purpose.
    local archived_at = tonumber(redis.call('HGET', keys[ACCOUNT], 'archived_at') or '0')
    local begun_at = tonumber(string.match(entry.request, '(%x%x%x%x%x%x%x%x%x%x%x%x)%x*$') or '0', 16)
    if entry.begun ~= '1' or begun_at <= archived_at + CLOCKS_OFF_MS or is_forgiven(keys, entry.request) then
      return {'absent'}
    end
    entry.reference = 'unheld'
    return collect(keys, account, entry)
  end
  if not LATE_AFTER[reason or ''] or is_forgiven(keys, entry.request) then
    return {'ended', ended}
  end
  local released = redis.call('XRANGE', keys[ENTRIES], seq .. '-0', seq .. '-0')[1]
  if not released then
    return {'absent'}
  end
  local of_release, fields = {}, released[2]
  for index = 1, #fields, 2 do
    of_release[fields[index]] = fields[index + 1]
  end
  if pack_terms(of_release) ~= pack_terms(entry) then
    return {'other_terms'}
  end
  if math.max(now_ms(), tonumber(account.at)) - tonumber(of_release.at) > LATE_MS_MAX then
    return {'ended', ended}
  end
  return collect(keys, account, entry)
end

-- Charges a request. Arguments as named; the terms are those of its hold.
local SETTLE_ARGS = {
  'tenant', 'request', 'amount', 'key', 'model', 'prompt', 'completion', 'cached', 'input', 'output', 'cached_input',
  'version', 'note', 'digest', 'begun', 'attempt',
}

local function settle(keys, args)
  local entry = named(args, SETTLE_ARGS)
  entry.kind = 'post'
  local request = entry.request
  local ended = redis.call('HGET', keys[ENDED], request)
  if ended and string.sub(ended, 1, 5) == 'post ' then
    return {'ended', ended}
  end
  local account, refusal = known(keys)
  if refusal then
    return refusal
  end
  if not is_amount(entry.amount) then
    return {'bad_amount'}
  end
  if overflows(keys, 'charged', entry.amount) then
    return {'overflow'}
  end
  local seq = tonumber(account.seq) + 1
  local used = tonumber(entry.prompt) + tonumber(entry.completion)
  local held = redis.call('HGET', keys[HOLDS], request)
  local terms, behind = unpack_terms(held and redis.call('HGET', keys[TERMS], request) or '')
  if held then
    if pack_terms(terms) ~= pack_terms(entry) then
      return {'other_terms'}
    end
    if tonumber(behind.attempt) > tonumber(entry.attempt) then
      return {'superseded'}
    end
    if redis.call('HINCRBY', keys[HOLDS], request, minus(entry.amount)) < 0 then
      redis.call('HINCRBY', keys[HOLDS], request, entry.amount)
      if entry.begun ~= '1' then
        return {'exceeds_hold', held}
      end
      if tonumber(entry.amount) > EXACT_MAX then
        return {'overflow'}
      end
      -- A store that died may have lost what the hold had grown by: the balance pays instead.
      local released = release_one(keys, entry.tenant, request, 'expired')
      if type(released) == 'table' then
        return released
      end
      held = false
      account = known(keys)
    end
  end
  if held then
    local rest = redis.call('HGET', keys[HOLDS], request)
    if not close_hold(keys, request, held, 'post ' .. entry.amount .. ' ' .. whole(seq), entry.key) then
      redis.call('HINCRBY', keys[HOLDS], request, entry.amount)
      return less_held_than_open(keys)
    end
    move_balance(keys, rest)
    entry.hold = held
    rate_give_back(keys[RATES], request, used)
    count_tokens(keys, entry.key, behind.day, math.min(used - tonumber(behind.tokens), 0))
    count_spend(keys, entry.key, behind.day, minus(rest))
  else
    local refused = post_late(keys, account, entry)
    if refused then
      return refused
    end
    local today = day_name(math.max(now_ms(), tonumber(account.at)))
    count_tokens(keys, entry.key, today, used)
    count_spend(keys, entry.key, today, entry.amount)
    seq = tonumber(redis.call('HGET', keys[ACCOUNT], 'seq')) + 1
    redis.call('HSET', keys[ENDED], request, 'post ' .. entry.amount .. ' ' .. whole(seq))
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'charged', entry.amount)
  append(keys, entry)
  count_usage(keys, entry)
  watch_balance(keys)
  return {'posted', held and 'held' or 'late'}
end

local function release(keys, args)
  local tenant, request, reason = args[1], args[2], args[3]
  local fault = look_at(keys)
  if fault then
    return fault
  end
  local released = release_one(keys, tenant, request, reason)
  if type(released) == 'table' then
    return released
  end
  return {released and 'released' or 'absent'}
end

local function renew(keys, args)
  local expiry = whole(now_ms() + tonumber(args[1]))
  local renewed = 0
  for index = 2, #args do
    if redis.call('HEXISTS', keys[HOLDS], args[index]) == 1 then
      redis.call('ZADD', keys[LEASES], expiry, args[index])
      renewed = renewed + 1
    end
  end
  return {'renewed', renewed}
end

-- A clock that was far ahead has made leases that end then: they get what is left of one from now on.
local function shorten_leases(keys, limit, from_ms)
  for _, request in ipairs(redis.call('ZRANGEBYSCORE', keys[LEASES], from_ms, '+inf', 'LIMIT', 0, limit)) do
    local _, behind = unpack_terms(redis.call('HGET', keys[TERMS], request) or '')
    local expiry = now_ms() + tonumber(behind.lease_ms)
    if tonumber(redis.call('ZSCORE', keys[LEASES], request)) > expiry then
      redis.call('ZADD', keys[LEASES], whole(expiry), request)
    end
  end
end

-- Arguments: tenant, how many at most, whether all (1), and from where on leases may be too long, if they are looked for.
local function sweep(keys, args)
  local tenant, limit, all, from_ms = args[1], args[2], args[3] == '1', args[4]
  local fault = look_at(keys)
  if fault then
    return fault
  end
  if from_ms then
    shorten_leases(keys, limit, from_ms)
  end
  local broken, swept, seen = release_expired(keys, tenant, limit, all and '+inf' or whole(now_ms()))
  return broken or {'swept', swept, seen}
end

local FREES = {'allow-oom'}

register('hold', hold)
register('extend', extend)
register('take_over', take_over, FREES)
register('forgive', forgive, FREES)
register('settle', settle, FREES)
register('release', release, FREES)
register('renew', renew, FREES)
register('sweep', sweep, FREES)
