-- What a tenant was admitted within the last minute, in requests and in tokens. A sliding window of buckets
-- of a second; the bucket at its far end counts whole, so that no minute ever has more than its limit.
--
-- One hash: for each name `NAME:sum`, `NAME:seen` (the bucket up to which old ones were taken off) and
-- `NAME:<bucket>`, and for each open request `of:<request>`, which is `<bucket>:<tokens>`.

local BUCKET_MS, BUCKETS = 1000, 60
local RATES_KEPT_MS = 2 * BUCKET_MS * BUCKETS

-- Takes off what the window has left behind. Answers the sum and the bucket of now.
local function rate_roll(key, name, now)
  local state = redis.call('HMGET', key, name .. ':sum', name .. ':seen')
  local bucket = math.floor(now / BUCKET_MS)
  local sum, seen = tonumber(state[1]) or 0, tonumber(state[2]) or bucket
  -- A clock that went back takes nothing off.
  bucket = math.max(bucket, seen)
  local old = {}
  for index = seen - BUCKETS, math.min(bucket - BUCKETS - 1, seen) do
    old[#old + 1] = name .. ':' .. whole(index)
  end
  if #old > 0 then
    for _, count in ipairs(redis.call('HMGET', key, unpack(old))) do
      sum = sum - (tonumber(count) or 0)
    end
    redis.call('HDEL', key, unpack(old))
  end
  redis.call('HSET', key, name .. ':sum', whole(sum), name .. ':seen', whole(bucket))
  return sum, bucket
end

-- In how many ms `amount` more fits, if nothing else comes; 0 where it does now.
local function rate_wait(key, name, now, sum, bucket, limit, amount)
  local over = sum + amount - limit
  for index = bucket - BUCKETS, bucket do
    if over <= 0 then
      break
    end
    local count = tonumber(redis.call('HGET', key, name .. ':' .. whole(index)) or '0')
    over = over - count
    if over <= 0 then
      return math.max(1, (index + BUCKETS + 1) * BUCKET_MS - now)
    end
  end
  return 0
end

local function rate_add(key, name, bucket, amount)
  redis.call('HINCRBY', key, name .. ':sum', amount)
  redis.call('HINCRBY', key, name .. ':' .. whole(bucket), amount)
end

-- In how many ms the window is empty, if nothing more comes.
local function rate_reset(key, name, now, sum, bucket)
  if sum <= 0 then
    return 0
  end
  local oldest = bucket - BUCKETS
  while bucket > oldest and tonumber(redis.call('HGET', key, name .. ':' .. whole(bucket)) or '0') <= 0 do
    bucket = bucket - 1
  end
  return (bucket + BUCKETS + 1) * BUCKET_MS - now
end

-- Counts a request and the most tokens that it may use, or neither. A limit of 0 is none. Answers an array
-- for the caller to pass on: `rate` with the name of the limit in the way and the ms to wait (0 where it can
-- never fit), or nothing; then requests left, ms to reset, tokens left, ms to reset.
local function rate_take(key, request, requests_max, tokens_max, tokens)
  local now = now_ms()
  local told = {}
  local wants = {{'requests', requests_max, 1}, {'tokens', tokens_max, tokens}}
  local sums, buckets, refused = {}, {}, nil
  for index, want in ipairs(wants) do
    local name, limit, amount = want[1], want[2], want[3]
    if limit > 0 then
      sums[index], buckets[index] = rate_roll(key, name, now)
      if sums[index] + amount > limit and not refused then
        local wait = 0
        if amount <= limit then
          wait = rate_wait(key, name, now, sums[index], buckets[index], limit, amount)
        end
        refused = {name, wait}
      end
    end
  end
  for index, want in ipairs(wants) do
    local name, limit, amount = want[1], want[2], want[3]
    if limit > 0 then
      if not refused then
        rate_add(key, name, buckets[index], amount)
        sums[index] = sums[index] + amount
        if name == 'tokens' then
          redis.call('HSET', key, 'of:' .. request, whole(buckets[index]) .. ':' .. whole(amount))
        end
      end
      told[#told + 1] = math.max(0, limit - sums[index])
      told[#told + 1] = rate_reset(key, name, now, sums[index], buckets[index])
    else
      told[#told + 1] = 0
      told[#told + 1] = 0
    end
  end
  if requests_max > 0 or tokens_max > 0 then
    redis.call('PEXPIRE', key, RATES_KEPT_MS)
  end
  return refused, told
end

-- Gives back what a request did not use of its tokens, as long as the window still counts them.
local function rate_give_back(key, request, used)
  local taken = redis.call('HGET', key, 'of:' .. request)
  if not taken then
    return
  end
  redis.call('HDEL', key, 'of:' .. request)
  local bucket, tokens = string.match(taken, '^(%d+):(%d+)$')
  local back = (tonumber(tokens) or 0) - used
  if back > 0 and redis.call('HEXISTS', key, 'tokens:' .. bucket) == 1 then
    rate_add(key, 'tokens', tonumber(bucket), -back)
  end
end
