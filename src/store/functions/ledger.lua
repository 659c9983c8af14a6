-- Money of one tenant. Amounts are decimal strings of nano-dollars and are only ever added by HINCRBY, in
-- 64 bits. Where a decision needs a comparison or a count of tokens (how many does this pay for?), it is made in
-- doubles, which are exact below 2^53: larger requests are refused, and larger balances cover any other. What was
-- decided is then moved by HINCRBY, and taken back if the result has the wrong sign.
--
-- keys: account, holds, terms, leases, ended, entries, rates, open (see common.lua).

local MONEY_FIELDS = {
  'balance', 'available', 'held', 'charged', 'granted', 'refunded', 'adjusted', 'credit', 'seq', 'archived', 'at',
}
local EXACT_MAX = 9000000000000000
local NO_LINK = '0000000000000000000000000000000000000000'
-- What an entry consists of, in the order in which its link covers it.
local ENTRY_FIELDS = {
  'kind', 'request', 'reference', 'tenant', 'key', 'model', 'prompt', 'completion', 'cached', 'input', 'output', 'cached_input',
  'version', 'amount', 'hold', 'balance', 'held', 'note', 'digest', 'at',
}
local COUNTS = {
  prompt = true, completion = true, cached = true, input = true, output = true, cached_input = true, hold = true,
}
local TERMS_FIELDS = {'key', 'model', 'input', 'output', 'cached_input', 'version'}
local USAGE_HOURS_KEPT_SECONDS, USAGE_MINUTES_KEPT_SECONDS = 400 * 86400, 2 * 86400

local function minus(amount)
  if amount == '0' then
    return '0'
  end
  if string.sub(amount, 1, 1) == '-' then
    return string.sub(amount, 2)
  end
  return '-' .. amount
end

local function is_amount(text)
  return text == '0' or (string.match(text, '^[1-9]%d*$') ~= nil and #text <= 19)
end

local function is_signed_amount(text)
  return is_amount(text) or is_amount(string.match(text, '^%-(.*)$') or '')
end

-- Answers an error for an account that cannot be what it should be, nil for a sound one, and nil, true for
-- one that does not exist. A missing field is never taken for 0. Last, the fields of a sound one.
local function look_at(keys)
  local fields = redis.call('HMGET', keys[ACCOUNT], unpack(MONEY_FIELDS))
  local entries = redis.call('XLEN', keys[ENTRIES])
  if redis.call('EXISTS', keys[ACCOUNT]) == 0 then
    if entries > 0 then
      return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' is gone and its ledger is not')
    end
    return nil, true
  end
  local account = {}
  for index, name in ipairs(MONEY_FIELDS) do
    if not fields[index] or not is_signed_amount(fields[index]) then
      return redis.error_reply('DAMAGED ' .. keys[ACCOUNT] .. ' has no sound ' .. name)
    end
    account[name] = fields[index]
  end
  if entries ~= tonumber(account.seq) - tonumber(account.archived) then
    return redis.error_reply('DAMAGED ' .. keys[ENTRIES] .. ' does not have as many entries as were written')
  end
  -- Fails on a key of another type before anything is written.
  redis.call('ZCARD', keys[LEASES])
  redis.call('HLEN', keys[HOLDS])
  redis.call('HLEN', keys[TERMS])
  redis.call('HLEN', keys[ENDED])
  redis.call('HLEN', keys[RATES])
  redis.call('HLEN', keys[OPEN])
  return nil, false, account
end

-- The fields of a tenant's account, or nil and what to answer instead.
local function known(keys)
  local fault, absent, account = look_at(keys)
  if fault or absent then
    return nil, fault or {'unknown_tenant'}
  end
  return account
end

-- Whether an account's field would leave 64 bits with so much more in it.
local function overflows(keys, field, amount)
  local sum = redis.pcall('HINCRBY', keys[ACCOUNT], field, amount)
  if type(sum) == 'table' and sum.err then
    return true
  end
  redis.call('HINCRBY', keys[ACCOUNT], field, minus(amount))
  return false
end

-- Whether so much more may come in: all that a tenant could ever have to spend must be an amount, also when every
-- hold is released and every charge given back, because neither of them can be refused then.
local function has_room_for(keys, account, amount)
  redis.call('HSET', keys[ACCOUNT], 'room', account.granted)
  local parts, fits = {account.adjusted, account.credit, amount}, true
  -- What takes away first, so that nothing overflows on the way that would not in the end.
  table.sort(parts, function(a, b)
    return string.sub(a, 1, 1) == '-' and string.sub(b, 1, 1) ~= '-'
  end)
  for _, part in ipairs(parts) do
    local sum = redis.pcall('HINCRBY', keys[ACCOUNT], 'room', part)
    fits = fits and not (type(sum) == 'table' and sum.err)
  end
  redis.call('HDEL', keys[ACCOUNT], 'room')
  return fits
end

-- The balance and what may be spent of it, which is the credit line more.
local function move_balance(keys, amount)
  redis.call('HINCRBY', keys[ACCOUNT], 'balance', amount)
  return redis.call('HINCRBY', keys[ACCOUNT], 'available', amount)
end

-- Appends an entry with the account as it is now. Its time never lies before that of the one before it, and its
-- link covers it and the link before it. Answers the entry.
local function append(keys, entry)
  local seq = redis.call('HINCRBY', keys[ACCOUNT], 'seq', 1)
  local state = redis.call('HMGET', keys[ACCOUNT], 'balance', 'held', 'link', 'at')
  entry.balance, entry.held = state[1], state[2]
  entry.at = whole(math.max(now_ms(), tonumber(state[4])))
  local fields, values = {}, {state[3] or NO_LINK, whole(seq)}
  for _, name in ipairs(ENTRY_FIELDS) do
    local value = entry[name] or (COUNTS[name] and '0') or ''
    fields[#fields + 1] = name
    fields[#fields + 1] = value
    values[#values + 1] = value
  end
  entry.seq, entry.link = whole(seq), redis.sha1hex(table.concat(values, '\31'))
  redis.call('XADD', keys[ENTRIES], entry.seq .. '-0', 'link', entry.link, unpack(fields))
  redis.call('HSET', keys[ACCOUNT], 'link', entry.link, 'at', entry.at)
  return entry
end

local function pack_terms(terms)
  local values = {}
  for index, name in ipairs(TERMS_FIELDS) do
    values[index] = terms[name]
  end
  return table.concat(values, '\31')
end

-- What stands behind the terms of a hold: the day that it counts for, the tokens that it counts with, what its tenant's
-- tier allowed to be spent, how long its lease is, and the attempt whose worker may settle, once there was more than one.
local BEHIND_TERMS = {'day', 'tokens', 'spend_per_day', 'spend_per_month', 'lease_ms', 'attempt'}

local function unpack_terms(text)
  local terms, behind, values = {}, {}, {}
  for value in string.gmatch(text .. '\31', '([^\31]*)\31') do
    values[#values + 1] = value
  end
  for index, name in ipairs(TERMS_FIELDS) do
    terms[name] = values[index] or ''
  end
  for index, name in ipairs(BEHIND_TERMS) do
    behind[name] = values[#TERMS_FIELDS + index] or '0'
  end
  return terms, behind
end

-- Arguments: name.
local function account_open(keys, args)
  local fault, absent = look_at(keys)
  if fault then
    return fault
  end
  if not absent then
    return {'exists'}
  end
  local now = whole(now_ms())
  redis.call('HSET', keys[ACCOUNT], 'name', args[1], 'created', now, 'status', 'active', 'tier', '',
    'balance', '0', 'available', '0', 'held', '0', 'charged', '0', 'granted', '0', 'refunded', '0', 'adjusted', '0',
    'credit', '0', 'seq', '0', 'archived', '0', 'link', NO_LINK, 'at', now)
  return {'opened'}
end

-- Whether something of this name was done before: nothing, or an answer for the caller. `what` is compared, so
-- that one name never stands for two things.
local function done_before(keys, name, what)
  local before = redis.call('HGET', keys[ENDED], name)
  if not before then
    return nil
  end
  if before ~= what then
    return {'other', before}
  end
  return {'repeated', redis.call('HGET', keys[ACCOUNT], 'balance')}
end

-- Money that a person moves. Arguments: tenant, reference, amount, note, and for a refund its request.
local function grant(keys, args)
  local ask = named(args, {'tenant', 'reference', 'amount', 'note'})
  local account, refusal = known(keys)
  if refusal then
    return refusal
  end
  if not is_amount(ask.amount) or ask.amount == '0' then
    return {'bad_amount'}
  end
  local once, what = 'grant ' .. ask.reference, ask.amount .. ' ' .. redis.sha1hex(ask.note)
  local before = done_before(keys, once, what)
  if before then
    return before
  end
  if overflows(keys, 'granted', ask.amount) or not has_room_for(keys, account, ask.amount) then
    return {'overflow'}
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'granted', ask.amount)
  move_balance(keys, ask.amount)
  redis.call('HSET', keys[ENDED], once, what)
  local entry = append(keys, {
    kind = 'grant', reference = ask.reference, tenant = ask.tenant, amount = ask.amount, note = ask.note,
  })
  watch_balance(keys, true)
  return {'granted', entry.balance, entry.seq}
end

-- A correction, up or down.
local function adjust(keys, args)
  local ask = named(args, {'tenant', 'reference', 'amount', 'note'})
  local account, refusal = known(keys)
  if refusal then
    return refusal
  end
  if not is_signed_amount(ask.amount) or ask.amount == '0' then
    return {'bad_amount'}
  end
  local once, what = 'adjust ' .. ask.reference, ask.amount .. ' ' .. redis.sha1hex(ask.note)
  local before = done_before(keys, once, what)
  if before then
    return before
  end
  local is_less = string.sub(ask.amount, 1, 1) == '-'
  if overflows(keys, 'adjusted', ask.amount) or overflows(keys, 'available', ask.amount)
    or overflows(keys, 'balance', ask.amount) or not (is_less or has_room_for(keys, account, ask.amount)) then
    return {'overflow'}
  end
  if move_balance(keys, ask.amount) < 0 and is_less then
    move_balance(keys, minus(ask.amount))
    return {'insufficient', account.balance}
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'adjusted', ask.amount)
  redis.call('HSET', keys[ENDED], once, what)
  local entry = append(keys, {
    kind = 'adjust', reference = ask.reference, tenant = ask.tenant, amount = ask.amount, note = ask.note,
  })
  watch_balance(keys, string.sub(ask.amount, 1, 1) ~= '-')
  return {'adjusted', entry.balance, entry.seq}
end

-- Gives back what a request was charged, or a part of it.
local function refund(keys, args)
  local ask = named(args, {'tenant', 'reference', 'amount', 'note', 'request'})
  local _, refusal = known(keys)
  if refusal then
    return refusal
  end
  if not is_amount(ask.amount) or ask.amount == '0' then
    return {'bad_amount'}
  end
  local once = 'refund ' .. ask.reference
  local what = ask.amount .. ' ' .. ask.request .. ' ' .. redis.sha1hex(ask.note)
  local before = done_before(keys, once, what)
  if before then
    return before
  end
  local charged = string.match(redis.call('HGET', keys[ENDED], ask.request) or '', '^post (%d+) ')
  if not charged then
    return {'not_charged'}
  end
  local refundable = 'refundable ' .. ask.request
  local is_first = redis.call('HSETNX', keys[ENDED], refundable, charged) == 1
  local is_more = redis.call('HINCRBY', keys[ENDED], refundable, minus(ask.amount)) < 0
  if is_more or overflows(keys, 'available', ask.amount) then
    redis.call('HINCRBY', keys[ENDED], refundable, ask.amount)
    local left = redis.call('HGET', keys[ENDED], refundable)
    if is_first then
      redis.call('HDEL', keys[ENDED], refundable)
    end
    return {is_more and 'exceeds_charge' or 'overflow', left}
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'refunded', ask.amount)
  move_balance(keys, ask.amount)
  redis.call('HSET', keys[ENDED], once, what)
  local entry = append(keys, {
    kind = 'refund', request = ask.request, reference = ask.reference, tenant = ask.tenant, amount = ask.amount,
    note = ask.note,
  })
  watch_balance(keys, true)
  return {'refunded', entry.balance, entry.seq}
end

-- Sets the credit line: how far below zero the balance may go. Arguments: tenant, amount, note.
local function credit(keys, args)
  local ask = named(args, {'tenant', 'amount', 'note'})
  local account, refusal = known(keys)
  if refusal then
    return refusal
  end
  if not is_amount(ask.amount) then
    return {'bad_amount'}
  end
  if ask.amount == account.credit then
    return {'repeated', account.balance}
  end
  local before = account.credit
  account.credit = '0'
  if not has_room_for(keys, account, ask.amount) then
    return {'overflow'}
  end
  redis.call('HINCRBY', keys[ACCOUNT], 'available', minus(before))
  redis.call('HINCRBY', keys[ACCOUNT], 'available', ask.amount)
  redis.call('HSET', keys[ACCOUNT], 'credit', ask.amount)
  local entry = append(keys, {kind = 'credit', tenant = ask.tenant, amount = ask.amount, note = ask.note})
  watch_balance(keys, #ask.amount > #before or #ask.amount == #before and ask.amount > before)
  return {'set', entry.balance, entry.seq}
end

-- Changes what an account says beside its money. Arguments: field and value, in pairs; an empty value of a limit
-- takes it away.
local function account_set(keys, args)
  local _, refusal = known(keys)
  if refusal then
    return refusal
  end
  for index = 1, #args, 2 do
    -- Whoever names another amount wants to be told of that one as well.
    if args[index] == 'low' and redis.call('HGET', keys[ACCOUNT], 'low') ~= args[index + 1] then
      redis.call('HDEL', keys[ACCOUNT], 'low_told')
    end
    if args[index + 1] == '' and string.sub(args[index], 1, 6) == 'limit:' then
      redis.call('HDEL', keys[ACCOUNT], args[index])
    else
      redis.call('HSET', keys[ACCOUNT], args[index], args[index + 1])
    end
  end
  watch_balance(keys)
  return {'set'}
end

-- The same for a key's record, which must not have ended: whoever changes it may have read it before it did. Arguments:
-- key, the secret (by its SHA-256) that it must still have ('' for whatever it has), then field and value, in pairs.
local function key_set(keys, args)
  local record = beside(keys, 'key:' .. args[1])
  local state = redis.call('HMGET', record, 'status', 'secret')
  if not state[1] then
    return {'unknown_key'}
  end
  if state[1] ~= 'active' then
    return {'ended'}
  end
  if args[2] ~= '' and args[2] ~= state[2] then
    return {'other_secret'}
  end
  for index = 3, #args, 2 do
    if args[index + 1] == '' then
      redis.call('HDEL', record, args[index])
    else
      redis.call('HSET', record, args[index], args[index + 1])
    end
  end
  return {'set'}
end

-- What of the limits is used. Arguments: key ('' for the tenant alone). Answers the account's tier and own limits, the
-- key's limits, then day, ms left of it and of its month, and now; then for the tenant and for the key: open requests,
-- requests, tokens and spend of the day, spend of the month, and what the windows of a minute have: requests, ms until
-- there are none, tokens, ms until there are none. Those are counted only where they are limited.
local function standing(keys, args)
  local now = now_ms()
  local day = day_name(now)
  local answer = {
    redis.call('HMGET', keys[ACCOUNT], 'tier', unpack(LIMIT_FIELDS)),
    redis.call('HMGET', beside(keys, 'key:' .. args[1]), unpack(LIMIT_FIELDS)),
    {day, whole(ms_left_of_day(now)), whole(ms_left_of_month(now)), whole(now)},
  }
  for _, party in ipairs(parties_of(keys, args[1], {}, {}, day)) do
    local told = {
      whole(party.open), whole(party.requests_day), whole(party.tokens_day), whole(party.spend_per_day),
      whole(party.spend_per_month),
    }
    for _, kind in ipairs({'requests', 'tokens'}) do
      local name = party.who .. ':' .. kind
      local sum, bucket = rate_look(keys[RATES], name, now)
      told[#told + 1] = whole(sum)
      told[#told + 1] = whole(rate_reset(keys[RATES], name, now, sum, bucket))
    end
    answer[#answer + 1] = told
  end
  return answer
end

-- The account, its open holds and its counters at one instant. Entries up to `seq` cannot change afterwards, so whoever
-- audits reads them at leisure; and so are the counters of hours before that of the last entry.
local function snapshot(keys)
  local at = tonumber(redis.call('HGET', keys[ACCOUNT], 'at') or '') or 0
  local now = now_ms()
  local day = day_name(now)
  return {
    redis.call('HGETALL', keys[ACCOUNT]),
    redis.call('HGETALL', keys[HOLDS]),
    redis.call('ZRANGE', keys[LEASES], 0, -1),
    redis.call('HGETALL', keys[TERMS]),
    redis.call('HGETALL', keys[OPEN]),
    redis.call('HLEN', keys[ENDED]),
    redis.call('XLEN', keys[ENTRIES]),
    redis.call('GET', beside(keys, 'checkpoint')),
    whole(now),
    redis.call('HGETALL', beside(keys, 'usage:hour:' .. whole(math.floor(at / 3600000)))),
    redis.call('HGETALL', beside(keys, 'period:' .. day)),
    redis.call('HGETALL', beside(keys, 'period:' .. string.sub(day, 1, 6))),
  }
end

register('account_open', account_open)
register('account_set', account_set)
register('key_set', key_set)
register('grant', grant)
register('adjust', adjust)
register('refund', refund)
register('credit', credit)
register('standing', standing, {'no-writes'})
register('snapshot', snapshot, {'no-writes'})
