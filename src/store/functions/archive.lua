-- Takes entries that lie in an archive out of the store, a bounded number at a time, and with them how their requests
-- ended: those are not charged, given back or released any more. References are remembered for ever.

local TRIM_MAX = 1024

-- Arguments: the last entry that is out already and the last that is to be, with its time and link; the checkpoint
-- after it.
local function trim(keys, args)
  local ask = named(args, {'after', 'upto', 'at', 'link', 'checkpoint'})
  local account, refusal = known(keys)
  if refusal then
    return refusal
  end
  if ask.after ~= account.archived then
    return {'moved', account.archived}
  end
  local after, upto = tonumber(ask.after), tonumber(ask.upto)
  if not upto or upto <= after or upto > tonumber(account.seq) or upto - after > TRIM_MAX then
    return {'bad_range'}
  end
  local entries = redis.call('XRANGE', keys[ENTRIES], whole(after + 1) .. '-0', whole(upto) .. '-0')
  if #entries ~= upto - after then
    return redis.error_reply('DAMAGED ' .. keys[ENTRIES] .. ' lacks entries before ' .. ask.upto)
  end
  local forgotten = {}
  for index, entry in ipairs(entries) do
    local fields = {}
    for at = 1, #entry[2], 2 do
      fields[entry[2][at]] = entry[2][at + 1]
    end
    if index == #entries and fields.link ~= ask.link then
      return {'other'}
    end
    if fields.kind == 'post' or fields.kind == 'release' then
      -- What was charged late is remembered with its charge.
      local ended = tonumber(string.match(redis.call('HGET', keys[ENDED], fields.request) or '', ' (%d+)$') or '')
      if ended and ended <= upto then
        forgotten[#forgotten + 1] = fields.request
      end
    end
  end
  for _, request in ipairs(forgotten) do
    redis.call('HDEL', keys[ENDED], request, 'refundable ' .. request)
  end
  redis.call('XTRIM', keys[ENTRIES], 'MINID', '=', whole(upto + 1) .. '-0')
  redis.call('HSET', keys[ACCOUNT], 'archived', ask.upto, 'archived_at', ask.at)
  redis.call('SET', beside(keys, 'checkpoint'), ask.checkpoint)
  return {'trimmed'}
end

register('trim', trim, {'allow-oom'})
