-- What a tenant and a key may use: limits of rate (by minute and by day), of requests at a time, and of spend (by
-- day and by month). The tenant's are those of its tier, which the caller names, unless the account has its own
-- (`limit:NAME`); a key has only its own. 0 is no limit. Days and months are those of UTC, by the clock of the
-- store.
--
-- Beside the account lies a hash for each day and each month: `<who>:requests`, `<who>:tokens`, `<who>:spend`,
-- where who is `t` or `k:<key>`. Tokens and spend count with the most that an open request may use, and with
-- what it used once it has ended; they count for the day on which it was admitted.

local LIMITS = {
  'requests_per_minute', 'tokens_per_minute', 'requests_per_day', 'tokens_per_day', 'requests_at_once',
  'spend_per_day', 'spend_per_month',
}
local LIMIT_FIELDS = {
  'limit:requests_per_minute', 'limit:tokens_per_minute', 'limit:requests_per_day', 'limit:tokens_per_day',
  'limit:requests_at_once', 'limit:spend_per_day', 'limit:spend_per_month',
}
-- Longer than any request, and long enough to be looked at.
local DAY_KEPT_SECONDS, MONTH_KEPT_SECONDS = 3 * 86400, 70 * 86400
local CONCURRENT_WAIT_MS = 1000

local function ms_left_of_day(now)
  return DAY_MS - now % DAY_MS
end

local function ms_left_of_month(now)
  local _, month, day = civil(now)
  local left = ms_left_of_day(now)
  local next_day = now + left
  while select(2, civil(next_day)) == month do
    left, next_day = left + DAY_MS, next_day + DAY_MS
  end
  return left
end

local function limits_from(own, tier)
  local limits = {}
  for index, name in ipairs(LIMITS) do
    local text = own[index] or (tier and tier[index]) or '0'
    limits[name] = tonumber(text)
    if not limits[name] then
      return nil, name
    end
  end
  return limits
end

-- Those who have limits: the tenant and the key, each with what it has used on a day and in its month.
local function parties_of(keys, key, tenant_limits, key_limits, day)
  local month = string.sub(day, 1, 6)
  local parties = {
    {who = 't', label = 'tenant', limits = tenant_limits, open = redis.call('HLEN', keys[HOLDS])},
    {
      who = 'k:' .. key, label = 'key', limits = key_limits,
      open = tonumber(redis.call('HGET', keys[OPEN], key) or '0'),
    },
  }
  for _, party in ipairs(parties) do
    local who = party.who
    local of_day = redis.call(
      'HMGET', beside(keys, 'period:' .. day), who .. ':requests', who .. ':tokens', who .. ':spend')
    party.requests_day, party.tokens_day = tonumber(of_day[1] or '0'), tonumber(of_day[2] or '0')
    party.spend_per_day = tonumber(of_day[3] or '0')
    party.spend_per_month = tonumber(redis.call('HGET', beside(keys, 'period:' .. month), who .. ':spend') or '0')
  end
  return parties
end

-- Which limit of requests at a time is in the way.
local function too_many_open(parties)
  for _, party in ipairs(parties) do
    if party.limits.requests_at_once > 0 and party.open >= party.limits.requests_at_once then
      return party
    end
  end
end

-- The windows of requests and tokens that have a limit, as they would be with one more request of so many
-- tokens. Answers them, and the first that would be overrun.
local function rate_windows(keys, parties, tokens, now)
  local windows, overrun = {}, nil
  local function add(party, limit, window)
    window.limit, window.party = limit, party
    windows[#windows + 1] = window
    if window.used + window.amount > limit and not overrun then
      overrun = window
    end
  end
  for _, party in ipairs(parties) do
    for _, want in ipairs({{'requests', 1}, {'tokens', tokens}}) do
      local kind, amount = want[1], want[2]
      local minute, day = party.limits[kind .. '_per_minute'], party.limits[kind .. '_per_day']
      if minute > 0 then
        local name = party.who .. ':' .. kind
        local sum, bucket = rate_roll(keys[RATES], name, now)
        add(party, minute, {
          limit_name = kind .. '_per_minute', kind = kind, name = name, bucket = bucket, used = sum, amount = amount,
        })
      end
      if day > 0 then
        add(party, day, {limit_name = kind .. '_per_day', kind = kind, used = party[kind .. '_day'], amount = amount})
      end
    end
  end
  return windows, overrun
end

local function window_wait(keys, window, now)
  if window.amount > window.limit then
    return 0
  end
  if window.bucket then
    return rate_wait(keys[RATES], window.name, now, window.used, window.bucket, window.limit, window.amount)
  end
  return ms_left_of_day(now)
end

-- Limit, what is left, and ms to reset of the tightest window of requests, then the same of tokens; 0, 0, 0
-- where there is none.
local function tell_windows(keys, windows, now)
  local told = {}
  for _, kind in ipairs({'requests', 'tokens'}) do
    local tightest
    for _, window in ipairs(windows) do
      if window.kind == kind and (not tightest or window.limit - window.used < tightest.limit - tightest.used) then
        tightest = window
      end
    end
    local reset = 0
    if tightest and tightest.bucket then
      reset = rate_reset(keys[RATES], tightest.name, now, tightest.used, tightest.bucket)
    elseif tightest then
      reset = ms_left_of_day(now)
    end
    told[#told + 1] = tightest and whole(tightest.limit) or '0'
    told[#told + 1] = tightest and whole(math.max(0, tightest.limit - tightest.used)) or '0'
    told[#told + 1] = whole(reset)
  end
  return told
end

-- Counts a request in all its windows, and in the day.
local function count_request(keys, request, parties, windows, tokens, day)
  local taken, limited = whole(tokens), false
  for _, window in ipairs(windows) do
    window.used = window.used + window.amount
    if window.bucket then
      limited = true
      rate_add(keys[RATES], window.name, window.bucket, window.amount)
      if window.kind == 'tokens' then
        taken = taken .. ' ' .. window.name .. '=' .. whole(window.bucket)
      end
    end
  end
  if limited then
    redis.call('HSET', keys[RATES], 'of:' .. request, taken)
    redis.call('PEXPIRE', keys[RATES], RATES_KEPT_MS)
  end
  local of_day = beside(keys, 'period:' .. day)
  for _, party in ipairs(parties) do
    redis.call('HINCRBY', of_day, party.who .. ':requests', '1')
    redis.call('HINCRBY', of_day, party.who .. ':tokens', whole(tokens))
  end
  redis.call('EXPIRE', of_day, DAY_KEPT_SECONDS)
end

-- Moves tokens and spend of a day and its month, of the tenant and of a key.
local function count_spend(keys, key, day, amount)
  local of_day = beside(keys, 'period:' .. day)
  local of_month = beside(keys, 'period:' .. string.sub(day, 1, 6))
  for _, who in ipairs({'t', 'k:' .. key}) do
    redis.call('HINCRBY', of_day, who .. ':spend', amount)
    redis.call('HINCRBY', of_month, who .. ':spend', amount)
  end
  redis.call('EXPIRE', of_day, DAY_KEPT_SECONDS)
  redis.call('EXPIRE', of_month, MONTH_KEPT_SECONDS)
end

local function count_tokens(keys, key, day, tokens)
  if tokens ~= 0 then
    local of_day = beside(keys, 'period:' .. day)
    redis.call('HINCRBY', of_day, 't:tokens', whole(tokens))
    redis.call('HINCRBY', of_day, 'k:' .. key .. ':tokens', whole(tokens))
    redis.call('EXPIRE', of_day, DAY_KEPT_SECONDS)
  end
end

-- The least money that the limits of spend leave, and which limit that is; nothing where there is none. Limits
-- are below 2^53, so that the comparison is exact wherever it matters.
local function spend_room(parties)
  local room, party_in_way, name_in_way
  for _, party in ipairs(parties) do
    for _, name in ipairs({'spend_per_day', 'spend_per_month'}) do
      local limit = party.limits[name]
      if limit > 0 and (not room or limit - party[name] < room) then
        room, party_in_way, name_in_way = limit - party[name], party, name
      end
    end
  end
  return room, party_in_way, name_in_way
end

local function spend_wait(name, now)
  return name == 'spend_per_day' and ms_left_of_day(now) or ms_left_of_month(now)
end
