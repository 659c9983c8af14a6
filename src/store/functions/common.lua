-- Shared by all functions. A function is atomic, but Redis undoes nothing when one fails in the middle:
-- each therefore checks everything that it depends on before its first write.

local function register(name, callback, flags)
  redis.register_function{
    function_name = 'lightcone_' .. name .. '_' .. VERSION,
    callback = callback,
    flags = flags or {},
  }
end

-- Whole numbers that are no money (times, counts) fit a double exactly; this keeps them out of 1e+15 form.
local function whole(number)
  return string.format('%.0f', number)
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
