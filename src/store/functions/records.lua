-- Idempotency keys: who has asked first, and what was answered. Only the asker itself changes what it has set, so
-- that one that was away for too long neither frees nor answers for the next.
--
-- keys: 1 the question, 2 its answer, 3 the last request that was run for it. The question is an opaque value that differs
-- for every asker.

-- args: question, lease, request, how long it is remembered. Answers which request was run before, if one was.
local function once_begin(keys, args)
  local question, lease_ms, request, retention_ms = args[1], args[2], args[3], args[4]
  local before = redis.call('GET', keys[1])
  if before then
    return {'asked', before}
  end
  redis.call('SET', keys[1], question, 'PX', lease_ms)
  redis.call('DEL', keys[2])
  local run_before = redis.call('GET', keys[3])
  redis.call('SET', keys[3], request, 'PX', retention_ms)
  return {'first', run_before ~= request and run_before or ''}
end

local function is_anothers(key, question)
  local now = redis.call('GET', key)
  return now and now ~= question
end

local function once_renew(keys, args)
  local question, lease_ms = args[1], args[2]
  if is_anothers(keys[1], question) then
    return {'lost'}
  end
  redis.call('SET', keys[1], question, 'PX', lease_ms)
  return {'renewed'}
end

local function once_answer(keys, args)
  local question, answer, retention_ms = args[1], args[2], args[3]
  if is_anothers(keys[1], question) then
    return {'lost'}
  end
  redis.call('SET', keys[1], question, 'PX', retention_ms)
  redis.call('SET', keys[2], answer, 'PX', retention_ms)
  return {'answered'}
end

local function once_forget(keys, args)
  if is_anothers(keys[1], args[1]) then
    return {'lost'}
  end
  redis.call('DEL', keys[1], keys[2])
  return {'forgotten'}
end

register('once_begin', once_begin)
register('once_renew', once_renew)
register('once_answer', once_answer)
register('once_forget', once_forget)
