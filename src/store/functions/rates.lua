-- What was admitted within the last minute, in requests and in tokens, by a tenant (`t`) and by each of its keys
-- that has a limit of its own (`k:<key>`). A sliding window of buckets of a second; the bucket at its far end
-- counts whole, so that no minute ever has more than its limit.
--
-- One hash: for each name, such as `t:tokens`, `NAME:sum`, `NAME:seen` (the bucket up to which old ones were
-- taken off) and `NAME:<bucket>`; for each open request `of:<request>`, which is the tokens that it counted with
-- and then `<name>=<bucket>` for each window that counted them.

local BUCKET_MS, BUCKETS = 1000, 60
local RATES_KEPT_MS = 2 * BUCKET_MS * BUCKETS

-- The sum of the window and the bucket of now; last, the fields that the window has left behind.
local function rate_look(key, name, now)
  local state = redis.call('HMGET', key, name .. ':sum', name .. ':seen')
  local bucket = math.floor(now / BUCKET_MS)
  local sum, seen = tonumber(state[1]) or 0, tonumber(state[2]) or bucket
  -- A clock that went back a little takes nothing off. What was counted by one that was far ahead says nothing of now.
  local last = seen
  if seen <= bucket + BUCKETS then
    bucket = math.max(bucket, seen)
    last = math.min(bucket - BUCKETS - 1, seen)
  end
  local old = {}
  for index = seen - BUCKETS, last do
    old[#old + 1] = name .. ':' .. whole(index)
  end
  if #old > 0 then
    for _, count in ipairs(redis.call('HMGET', key, unpack(old))) do
      sum = sum - (tonumber(count) or 0)
    end
  end
  return sum, bucket, old
end

-- Takes off what the window has left behind. Answers the sum and the bucket of now.
local function rate_roll(key, name, now)
  local sum, bucket, old = rate_look(key, name, now)
  if #old > 0 then
    redis.call('HDEL', key, unpack(old))
  end
  redis.call('HSET', key, name .. ':sum', whole(sum), name .. ':seen', whole(bucket))
  return sum, bucket
end

-- In how many ms `amount` more fits, if nothing else comes; 0 where it never does.
local function rate_wait(key, name, now, sum, bucket, limit, amount)
  if amount > limit then
    return 0
  end
  local over = sum + amount - limit
  for index = bucket - BUCKETS, bucket do
    local count = tonumber(redis.call('HGET', key, name .. ':' .. whole(index)) or '0')
    over = over - count
    if over <= 0 then
      return math.max(1, (index + BUCKETS + 1) * BUCKET_MS - now)
    end
  end
  return BUCKETS * BUCKET_MS
end

local function rate_add(key, name, bucket, amount)
  redis.call('HINCRBY', key, name .. ':sum', whole(amount))
  redis.call('HINCRBY', key, name .. ':' .. whole(bucket), whole(amount))
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
  return math.max(0, (bucket + BUCKETS + 1) * BUCKET_MS - now)
end

-- Gives back what a request did not use of its tokens, as far as the windows still count them.
local function rate_give_back(key, request, used)
  local taken = redis.call('HGET', key, 'of:' .. request)
  if not taken then
    return
  end
  redis.call('HDEL', key, 'of:' .. request)
  local tokens, windows = string.match(taken, '^(%d+)(.*)$')
  local back = (tonumber(tokens) or 0) - used
  if back <= 0 then
    return
  end
  for name, bucket in string.gmatch(windows, ' ([^= ]+)=(%d+)') do
    if redis.call('HEXISTS', key, name .. ':' .. bucket) == 1 then
      rate_add(key, name, tonumber(bucket), -back)
    end
  end
end
