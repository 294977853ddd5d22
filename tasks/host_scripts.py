"""The Lua scripts of the record that are about hosts."""

from tasks.keys import PREFIX
from tasks.scripts import COMMON

# KEYS: owner of a host's name.  ARGV: owner, seconds.
NAME = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""

# What is known of all hosts. Answers, for each: name, facts of its heartbeat ('' if it is silent), those that
# it said last, its drain, its sandboxes, those that are being launched, bytes of memory asked for.
ALL = (
    f"""
local P = '{PREFIX}'
"""
    + """
local last, names, seen = {}, {}, {}
local pairs_of = redis.call('HGETALL', P .. 'hosts:last')
for number = 1, #pairs_of, 2 do last[pairs_of[number]] = pairs_of[number + 1] end
for _, name in ipairs(redis.call('SMEMBERS', P .. 'hosts')) do seen[name] = true end
for name in pairs(last) do seen[name] = true end
for name in pairs(seen) do names[#names + 1] = name end
table.sort(names)
local out = {}
for _, name in ipairs(names) do
  local key = P .. 'host:' .. name
  local bytes = 0
  for _, one in ipairs(redis.call('HVALS', key .. ':memory')) do bytes = bytes + tonumber(one) end
  for _, one in ipairs({name, redis.call('GET', key) or '', last[name] or '',
      redis.call('HGET', P .. 'drains', name) or '', redis.call('SCARD', key .. ':sandboxes'),
      redis.call('SCARD', key .. ':launching'), string.format('%.0f', bytes)}) do
    out[#out + 1] = one
  end
end
return out
"""
)

# ARGV: names of hosts.  Answers those that are lost.
LOST_OF = (
    f"""
local P = '{PREFIX}'
"""
    + """
local lost = {}
for _, name in ipairs(ARGV) do
  if redis.call('EXISTS', P .. 'host:' .. name) == 0 then
    local last = redis.call('HGET', P .. 'hosts:last', name)
    if last and not cjson.decode(last).left then lost[#lost + 1] = name end
  end
end
return lost
"""
)

# The newest wish is kept; with `force` this one is newer than any, whatever the clocks say.
# ARGV: host, wish as JSON, '1' for force.  Answers 1 if it is kept.
DRAIN = (
    f"""
local key = '{PREFIX}drains'
"""
    + """
local old, wish = redis.call('HGET', key, ARGV[1]), cjson.decode(ARGV[2])
local old_at = old and cjson.decode(old).at or 0
if wish.at <= old_at then
  if ARGV[3] ~= '1' then return 0 end
  wish.at = old_at + 0.001
end
redis.call('HSET', key, ARGV[1], cjson.encode(wish))
return 1
"""
)

# ARGV: host.  Answers 1 if it is forgotten, 0 if it lives.  Its sandboxes have ended in the record before.
FORGET = (
    f"""
local P, host = '{PREFIX}', ARGV[1]
"""
    + """
if redis.call('EXISTS', P .. 'host:' .. host) == 1 then return 0 end
redis.call('SREM', P .. 'hosts', host)
redis.call('HDEL', P .. 'hosts:last', host)
redis.call('HDEL', P .. 'drains', host)
for _, what in ipairs({'sandboxes', 'memory', 'launching', 'owner', 'waiting', 'fetched', 'pulls',
    'orders'}) do
  redis.call('DEL', P .. 'host:' .. host .. ':' .. what)
end
redis.call('DEL', P .. 'bell:' .. host)
return 1
"""
)

# A sweep of the fleet: count for each host how many sweeps in a row have found it lost.
# ARGV: how many are enough.  Answers the hosts that have been lost for so long.
MISSING = (
    f"""
local P = '{PREFIX}'
"""
    + """
for _, name in ipairs(redis.call('SMEMBERS', P .. 'hosts')) do  -- release 0.1.0 does not note it itself
  local said = redis.call('GET', P .. 'host:' .. name)
  if said and not cjson.decode(said).pulls then redis.call('HSET', P .. 'hosts:last', name, said) end
end
local missing, found = P .. 'hosts:missing', {}
for _, name in ipairs(redis.call('HKEYS', missing)) do
  if redis.call('HEXISTS', P .. 'hosts:last', name) == 0 then redis.call('HDEL', missing, name) end
end
local last = redis.call('HGETALL', P .. 'hosts:last')
for number = 1, #last, 2 do
  local name = last[number]
  if redis.call('EXISTS', P .. 'host:' .. name) == 1 or cjson.decode(last[number + 1]).left then
    redis.call('HDEL', missing, name)
  elseif redis.call('HINCRBY', missing, name, 1) >= tonumber(ARGV[1]) then
    found[#found + 1] = name
  end
end
return found
"""
)

# Launch a sandbox of a lost host anew: a new record takes its place in the batch, the old one names it.
# Its signature is of the first of them, and goes with the note of who launches that (`tasks.claims`).
# ARGV: id, new id, host, now (text), now (s), length of the stream, seconds of that note.
# Answers 1 if it was done.
RESCHEDULE = (
    COMMON
    + """
local id, new, host, at, now, kept = unpack(ARGV)
-- What ends already need not begin anew.
local CAN = {placed=true, launching=true, running=true, restarting=true}
if redis.call('EXISTS', P .. 'host:' .. host) == 1 then return 0 end
local state, owner, asks, batch, replaced, removed, cancelled, stopped = unpack(redis.call('HMGET', rec(id),
  'state', 'host', 'reschedule', 'batch', 'replaced_by', 'removed', 'cancel', 'stop'))
if not CAN[state] or owner ~= host or not asks then return 0 end
if replaced or removed or cancelled or stopped then return 0 end
if redis.call('HGET', P .. 'batch:' .. batch, 'cancelled') then return 0 end  -- its mark is on the way
for _, field in ipairs({'spec', 'line', 'queue', 'memory', 'nets', 'command', 'reschedule', 'up'}) do
  local value = redis.call('HGET', rec(id), field)
  if value then redis.call('HSET', rec(new), field, value) end
end
redis.call('HSET', rec(new), 'id', new, 'batch', batch, 'attempt', 1, 'state', 'queued', 'created_at', at,
           'replaces', id)
local sealed = redis.call('GET', P .. 'sealed:' .. id)
if sealed then redis.call('SET', P .. 'sealed:' .. new, sealed) end
local signed = redis.call('HGET', rec(id), 'signed_as') or id
if redis.call('GET', P .. 'taken:' .. signed) == host .. ' ' .. id then  -- else it was never launched so
  redis.call('SET', P .. 'taken:' .. signed, '* ' .. new, 'EX', ARGV[7])
  redis.call('HSET', rec(new), 'signed_as', signed)
end
redis.call('HSET', rec(id), 'replaced_by', new)
redis.call('ZADD', P .. 'sandboxes', now, new)
local deadline = redis.call('ZSCORE', P .. 'deadlines', id)
if deadline then redis.call('ZADD', P .. 'deadlines', deadline, new) end
local ids = P .. 'batch:' .. batch .. ':ids'
if redis.call('LINSERT', ids, 'BEFORE', id, new) > 0 then redis.call('LREM', ids, 1, id) end
offer(new, now)
ring(P .. 'bell')
tell(new, batch, 'queued', '', at, kept)
return 1
"""
)
