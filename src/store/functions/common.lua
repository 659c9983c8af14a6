-- Shared by all functions. A function is atomic, but Redis undoes nothing when one fails in the middle:
-- each therefore checks everything that it depends on before its first write.

-- The time that the function which runs now goes by: one from its beginning to its end, for not every server stops the
-- clock while it runs.
local clock_ms

-- `flags`: what ends or frees something has `allow-oom`, so that a full store can be emptied.
local function register(name, callback, flags)
  redis.register_function{
    function_name = 'lightcone_' .. name .. '_' .. VERSION,
    callback = function(keys, args)
      clock_ms = nil
      return callback(keys, args)
    end,
    flags = flags or {},
  }
end

-- Whole numbers below 2^53, exact in a double; this keeps them out of 1e+15 form.
local function whole(number)
  return string.format('%.0f', number)
end

local function now_ms()
  if not clock_ms then
    local time = redis.call('TIME')
    clock_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  end
  return clock_ms
end

-- Arguments by their names.
local function named(args, names)
  local result = {}
  for index, name in ipairs(names) do
    result[name] = args[index]
  end
  return result
end

local DAY_MS = 86400000

-- Year, month and day (UTC) of a time in ms; days since 1970 to civil date as in Howard Hinnant's paper.
local function civil(ms)
  local days = math.floor(ms / DAY_MS) + 719468
  local era = math.floor(days / 146097)
  local of_era = days - era * 146097
  local year_of_era = math.floor(
    (of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year_of_era + math.floor(year_of_era / 4) - math.floor(year_of_era / 100))
  local shifted = math.floor((5 * of_year + 2) / 153)
  local month = shifted < 10 and shifted + 3 or shifted - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  return year, month, of_year - math.floor((153 * shifted + 2) / 5) + 1
end

local function day_name(ms)
  return string.format('%04d%02d%02d', civil(ms))
end

-- The keys of a tenant, in the order in which all functions on its money take them.
local ACCOUNT, HOLDS, TERMS, LEASES, ENDED, ENTRIES, RATES, OPEN = 1, 2, 3, 4, 5, 6, 7, 8

-- Further ones, all in the same slot: they need not be named by the caller.
local function beside(keys, name)
  return string.sub(keys[ACCOUNT], 1, -#'account' - 1) .. name
end
