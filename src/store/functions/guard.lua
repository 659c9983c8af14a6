-- Failed authentications. An address that fails too often within a window is blocked for a while.
--
-- keys of auth_fail: 1 the times of an address's last failures, 2 there for as long as the address is blocked
-- keys of the others: 1 blocked addresses by the time at which their blocks end, 2 the revision of that list

-- Counts a failure; the one that is too many blocks, and begins a new count. The list never has more than `most`
-- times, and the window slides: blocked is who has failed `most` times within it.
local function auth_fail(keys, args)
  local most, window_ms, block_ms = tonumber(args[1]), tonumber(args[2]), tonumber(args[3])
  local left_ms = redis.call('PTTL', keys[2])
  if left_ms > 0 then
    return {'blocked', left_ms}
  end
  local now = now_ms()
  redis.call('RPUSH', keys[1], whole(now))
  redis.call('LTRIM', keys[1], -most, -1)
  redis.call('PEXPIRE', keys[1], window_ms)
  local count = redis.call('LLEN', keys[1])
  if count < most or tonumber(redis.call('LINDEX', keys[1], 0)) < now - window_ms then
    return {'counted'}
  end
  redis.call('DEL', keys[1])
  redis.call('SET', keys[2], whole(now), 'PX', block_ms)
  return {'blocked', block_ms}
end

-- Tells all edges. A full list forgets the block that ends first.
local function block_add(keys, args)
  local address, left_ms, most = args[1], tonumber(args[2]), tonumber(args[3])
  local now = now_ms()
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', whole(now))
  if redis.call('ZADD', keys[1], 'NX', whole(now + left_ms), address) == 0 then
    return {'known'}
  end
  local over = redis.call('ZCARD', keys[1]) - most
  if over > 0 then
    redis.call('ZREMRANGEBYRANK', keys[1], 0, over - 1)
  end
  -- Never one that an edge has seen before, also where the key had expired.
  local revision = math.max(now, (tonumber(redis.call('GET', keys[2]) or '0') or 0) + 1)
  redis.call('SET', keys[2], whole(revision))
  local last = redis.call('ZRANGE', keys[1], -1, -1, 'WITHSCORES')
  redis.call('PEXPIREAT', keys[1], last[2])
  redis.call('PEXPIREAT', keys[2], last[2])
  return {'added'}
end

-- Who is blocked, unless the asker knows this revision.
local function block_list(keys, args)
  local known, most = args[1], args[2]
  local revision = redis.call('GET', keys[2]) or ''
  if revision == known then
    return {'same'}
  end
  local now = whole(now_ms())
  local blocks = redis.call('ZRANGEBYSCORE', keys[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, most)
  return {'blocks', revision, now, blocks}
end

register('auth_fail', auth_fail)
register('block_add', block_add)
register('block_list', block_list, {'no-writes'})
