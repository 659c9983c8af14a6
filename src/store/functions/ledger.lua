-- Money of one tenant. Amounts are decimal strings of nano-dollars and are only ever added by HINCRBY, in
-- 64 bits; Lua looks at the sign of a result and at nothing else of it.
--
-- keys: 1 account, 2 holds, 3 terms, 4 leases, 5 ended, 6 entries, 7 rates.

local ACCOUNT, HOLDS, TERMS, LEASES, ENDED, ENTRIES, RATES = 1, 2, 3, 4, 5, 6, 7
local MONEY_FIELDS = {'balance', 'held', 'charged', 'granted', 'refunded', 'seq'}

local function minus(amount)
  if amount == '0' then
    return '0'
  end
  return '-' .. amount
end

local function is_amount(text)
  return text == '0' or (string.match(text, '^[1-9]%d*$') ~= nil and #text <= 19)
end

-- Answers an error for an account that cannot be what it should be, nil for a sound one, and nil, true for
-- one that does not exist. A missing field is never taken for 0.
local function look_at(keys)
  local fields = redis.call('HMGET', keys[ACCOUNT], unpack(MONEY_FIELDS))
  local entries = redis.call('XLEN', keys[ENTRIES])
  if redis.call('EXISTS', keys[ACCOUNT]) == 0 then
    if entries > 0 then
      return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' is gone and its ledger is not')
    end
    return nil, true
  end
  for index, name in ipairs(MONEY_FIELDS) do
    if not fields[index] or not is_amount(fields[index]) then
      return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' has no sound ' .. name)
    end
  end
  if entries ~= tonumber(fields[6]) then
    return redis.error_reply('DAMAGED ' .. keys[ENTRIES] .. ' does not have as many entries as were written')
  end
  -- Fails on a key of another type before anything is written.
  redis.call('ZCARD', keys[LEASES])
  redis.call('HLEN', keys[HOLDS])
  redis.call('HLEN', keys[TERMS])
  redis.call('HLEN', keys[ENDED])
  redis.call('HLEN', keys[RATES])
  return nil, false
end

-- Appends an entry with the balance as it is now.
local function append(keys, entry)
  local seq = redis.call('HINCRBY', keys[ACCOUNT], 'seq', 1)
  local balance = redis.call('HGET', keys[ACCOUNT], 'balance')
  redis.call('XADD', keys[ENTRIES], whole(seq) .. '-0',
    'kind', entry.kind, 'request', entry.request, 'tenant', entry.tenant,
    'key', entry.key or '', 'model', entry.model or '',
    'prompt', entry.prompt or '0', 'completion', entry.completion or '0', 'cached', entry.cached or '0',
    'input', entry.input or '0', 'output', entry.output or '0', 'version', entry.version or '',
    'amount', entry.amount, 'balance', balance, 'note', entry.note or '', 'at', whole(now_ms()))
  return balance
end

local function pack_terms(key, model, input, output, version)
  return table.concat({key, model, input, output, version}, '\31')
end

local function unpack_terms(terms)
  local key, model, input, output, version =
    string.match(terms, '^([^\31]*)\31([^\31]*)\31([^\31]*)\31([^\31]*)\31([^\31]*)$')
  return {key = key, model = model, input = input, output = output, version = version}
end

local function account_open(keys, args)
  local name = args[1]
  local fault, absent = look_at(keys)
  if fault then
    return fault
  end
  if not absent then
    return {'exists'}
  end
  redis.call('HSET', keys[ACCOUNT], 'name', name, 'created', whole(now_ms()),
    'balance', '0', 'held', '0', 'charged', '0', 'granted', '0', 'refunded', '0', 'seq', '0')
  return {'opened'}
end

local function grant(keys, args)
  local tenant, reference, amount, note = args[1], args[2], args[3], args[4]
  local fault, absent = look_at(keys)
  if fault then
    return fault
  end
  if absent then
    return {'unknown_tenant'}
  end
  if not is_amount(amount) or amount == '0' then
    return {'bad_amount'}
  end
  local once = 'grant ' .. reference
  if redis.call('HEXISTS', keys[ENDED], once) == 1 then
    return {'repeated', redis.call('HGET', keys[ACCOUNT], 'balance')}
  end
  -- Everything that a tenant has or had was granted or refunded, so this is the only sum that can overflow.
  local added = redis.pcall('HINCRBY', keys[ACCOUNT], 'granted', amount)
  if type(added) == 'table' and added.err then
    return {'overflow'}
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'balance', amount)
  redis.call('HSET', keys[ENDED], once, amount)
  return {'granted', append(keys, {kind = 'grant', request = reference, tenant = tenant, amount = amount, note = note})}
end

local function hold(keys, args)
  local tenant, request, amount, lease_ms = args[1], args[2], args[3], tonumber(args[4])
  local key, model, prompt, completion = args[5], args[6], args[7], args[8]
  local input, output, version = args[9], args[10], args[11]
  local requests_max, tokens_max = tonumber(args[12]), tonumber(args[13])
  local fault, absent = look_at(keys)
  if fault then
    return fault
  end
  if absent then
    return {'unknown_tenant'}
  end
  if not is_amount(amount) then
    return {'bad_amount'}
  end
  if redis.call('HEXISTS', keys[HOLDS], request) == 1 or redis.call('HEXISTS', keys[ENDED], request) == 1 then
    return {'repeated'}
  end
  if redis.call('HINCRBY', keys[ACCOUNT], 'balance', minus(amount)) < 0 then
    redis.call('HINCRBY', keys[ACCOUNT], 'balance', amount)
    return {'insufficient', redis.call('HGET', keys[ACCOUNT], 'balance')}
  end
  local tokens = tonumber(prompt) + tonumber(completion)
  local refused, told = rate_take(keys[RATES], request, requests_max, tokens_max, tokens)
  if refused then
    redis.call('HINCRBY', keys[ACCOUNT], 'balance', amount)
    return {'rate', refused[1], refused[2], unpack(told)}
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'held', amount)
  redis.call('HSET', keys[HOLDS], request, amount)
  redis.call('HSET', keys[TERMS], request, pack_terms(key, model, input, output, version))
  redis.call('ZADD', keys[LEASES], whole(now_ms() + lease_ms), request)
  append(keys, {
    kind = 'hold', request = request, tenant = tenant, key = key, model = model, prompt = prompt,
    completion = completion, input = input, output = output, version = version, amount = amount,
  })
  return {'held', unpack(told)}
end

-- Takes an open hold off the books, and leaves its money in nobody's hands: the caller books it at once.
-- Answers false if the account does not have as much on hold.
local function close_hold(keys, request, held, outcome)
  if redis.call('HINCRBY', keys[ACCOUNT], 'held', minus(held)) < 0 then
    redis.call('HINCRBY', keys[ACCOUNT], 'held', held)
    return false
  end
  redis.call('HDEL', keys[HOLDS], request)
  redis.call('HDEL', keys[TERMS], request)
  redis.call('ZREM', keys[LEASES], request)
  redis.call('HSET', keys[ENDED], request, outcome)
  return true
end

local function less_held_than_open(keys)
  return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' has less on hold than its open holds')
end

local function settle(keys, args)
  local tenant, request, amount, key, model = args[1], args[2], args[3], args[4], args[5]
  local prompt, completion, cached = args[6], args[7], args[8]
  local input, output, version, reason = args[9], args[10], args[11], args[12]
  local ended = redis.call('HGET', keys[ENDED], request)
  if ended then
    return {'ended', ended}
  end
  local fault, absent = look_at(keys)
  if fault then
    return fault
  end
  if absent then
    return {'unknown_tenant'}
  end
  if not is_amount(amount) then
    return {'bad_amount'}
  end
  local held = redis.call('HGET', keys[HOLDS], request)
  if not held then
    return {'absent'}
  end
  if redis.call('HGET', keys[TERMS], request) ~= pack_terms(key, model, input, output, version) then
    return {'other_terms'}
  end
  if redis.call('HINCRBY', keys[HOLDS], request, minus(amount)) < 0 then
    redis.call('HINCRBY', keys[HOLDS], request, amount)
    return {'exceeds_hold', held}
  end
  local rest = redis.call('HGET', keys[HOLDS], request)
  if not close_hold(keys, request, held, 'post ' .. amount) then
    redis.call('HINCRBY', keys[HOLDS], request, amount)
    return less_held_than_open(keys)
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'balance', rest)
  redis.call('HINCRBY', keys[ACCOUNT], 'charged', amount)
  rate_give_back(keys[RATES], request, tonumber(prompt) + tonumber(completion))
  return {'posted', append(keys, {
    kind = 'post', request = request, tenant = tenant, key = key, model = model, prompt = prompt,
    completion = completion, cached = cached, input = input, output = output, version = version,
    amount = amount, note = reason,
  })}
end

local function release_one(keys, tenant, request, reason)
  local held = redis.call('HGET', keys[HOLDS], request)
  if not held then
    return false
  end
  local entry = unpack_terms(redis.call('HGET', keys[TERMS], request) or '')
  if not close_hold(keys, request, held, 'release ' .. reason) then
    return less_held_than_open(keys)
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'balance', held)
  rate_give_back(keys[RATES], request, 0)
  entry.kind, entry.request, entry.tenant, entry.amount, entry.note = 'release', request, tenant, held, reason
  append(keys, entry)
  return true
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

local function sweep(keys, args)
  local tenant, limit, all = args[1], args[2], args[3] == '1'
  local fault = look_at(keys)
  if fault then
    return fault
  end
  local until_ms = all and '+inf' or whole(now_ms())
  local expired = redis.call('ZRANGEBYSCORE', keys[LEASES], '-inf', until_ms, 'LIMIT', 0, limit)
  local swept = 0
  for _, request in ipairs(expired) do
    local released = release_one(keys, tenant, request, 'expired')
    if type(released) == 'table' then
      return released
    end
    if released then
      swept = swept + 1
    else
      redis.call('ZREM', keys[LEASES], request)
    end
  end
  return {'swept', swept, #expired}
end

-- The account and its open holds at one instant. Entries up to `seq` cannot change afterwards, so whoever
-- audits reads them at leisure.
local function snapshot(keys)
  return {
    redis.call('HGETALL', keys[ACCOUNT]),
    redis.call('HGETALL', keys[HOLDS]),
    redis.call('ZRANGE', keys[LEASES], 0, -1),
    redis.call('HLEN', keys[ENDED]),
    redis.call('XLEN', keys[ENTRIES]),
  }
end

register('account_open', account_open)
register('grant', grant)
register('hold', hold)
register('settle', settle)
register('release', release)
register('renew', renew)
register('sweep', sweep)
register('snapshot', snapshot, {'no-writes'})
