-- Who is in the cluster.
--
-- keys: 1 leases (node to the end of its lease), 2 cards.

local LEASES_OF_NODES, CARDS = 1, 2

-- args: node, lease, card, how long lost ones are remembered.
local function node_announce(keys, args)
  local node, now = args[1], now_ms()
  redis.call('ZADD', keys[LEASES_OF_NODES], whole(now + tonumber(args[2])), node)
  redis.call('HSET', keys[CARDS], node, args[3])
  local old = redis.call('ZRANGEBYSCORE', keys[LEASES_OF_NODES], '-inf', whole(now - tonumber(args[4])), 'LIMIT', 0, 64)
  for _, other in ipairs(old) do
    redis.call('ZREM', keys[LEASES_OF_NODES], other)
    redis.call('HDEL', keys[CARDS], other)
  end
  return {'announced'}
end

local function node_leave(keys, args)
  redis.call('ZREM', keys[LEASES_OF_NODES], args[1])
  redis.call('HDEL', keys[CARDS], args[1])
  return {'left'}
end

-- args: the node behind which to begin, how many. By their ids: node, what is left of its lease, card.
local function node_list(keys, args)
  local behind, count, now = args[1], tonumber(args[2]), now_ms()
  local names = redis.call('HKEYS', keys[CARDS])
  table.sort(names)
  local nodes = {}
  for _, node in ipairs(names) do
    if #nodes >= count then
      break
    end
    local lease = node > behind and redis.call('ZSCORE', keys[LEASES_OF_NODES], node)
    if lease then
      nodes[#nodes + 1] = {node, tonumber(lease) - now, redis.call('HGET', keys[CARDS], node)}
    end
  end
  return nodes
end

register('node_announce', node_announce, {'allow-oom'})
register('node_leave', node_leave, {'allow-oom'})
register('node_list', node_list, {'no-writes'})
