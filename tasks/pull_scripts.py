"""The Lua scripts of the record that are about pulls of images."""

from tasks.keys import PREFIX
from tasks.scripts import COMMON

# ARGV: batch, reference, digest, expiry where there is no such batch (any more).
# Answers the digest that counts: of the first who pinned.
PIN = (
    f"""
local batch = '{PREFIX}batch:' .. ARGV[1]
"""
    + """
local pins = batch .. ':images'
redis.call('HSETNX', pins, ARGV[2], ARGV[3])
local lives = redis.call('TTL', batch)
if lives == -2 then lives = tonumber(ARGV[4]) end
if lives >= 0 then redis.call('EXPIRE', pins, lives) end
return redis.call('HGET', pins, ARGV[2])
"""
)

# ARGV: batch, reference.  Answers the digest, or nothing. A batch that has grown lives again, with its pins:
# its client may not touch them, since they say what is run.
PINNED = (
    f"""
local batch = '{PREFIX}batch:' .. ARGV[1]
"""
    + """
local pins = batch .. ':images'
if redis.call('TTL', batch) == -1 then redis.call('PERSIST', pins) end
return redis.call('HGET', pins, ARGV[2])
"""
)

# Line up launches whose image is on the host now; script TAKE lets them go on as there are slots.
# ARGV: host, now (s), seconds after which one that was let go has lost its message, id, ...
ADMIT = (
    COMMON
    + """
local host, now, lost = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local count = 0
for number = 4, #ARGV do
  local id = ARGV[number]
  local state, owner, waits, at =
    unpack(redis.call('HMGET', rec(id), 'state', 'host', 'waits', 'admitted_at'))
  local is_lost = waits == '0' and now - tonumber(at or 0) > lost
  if owner == host and state == 'launching' and (waits == '1' or is_lost) then
    if is_lost then
      redis.call('HSET', rec(id), 'waits', '1')
      redis.call('SREM', host_key(host, 'launching'), id)
      redis.call('SADD', host_key(host, 'waiting'), id)
    end
    count = count + redis.call('ZADD', host_key(host, 'fetched'), 'NX', now + number * 1e-6, id)
  end
end
if count > 0 then ring(P .. 'bell:' .. host) end
return count
"""
)

# ARGV: id of the order, expiry, most notes, field, value, ...
TELL = (
    f"""
local key = '{PREFIX}pull:' .. ARGV[1]
"""
    + """
local state, host = unpack(redis.call('HMGET', key, 'state', 'host'))
if not state or state == 'done' or state == 'failed' then return 0 end
redis.call('HSET', key, unpack(ARGV, 4))
redis.call('EXPIRE', key, ARGV[2])
redis.call('XADD', key .. ':notes', 'MAXLEN', '~', ARGV[3], '*', 'look', '1')
redis.call('EXPIRE', key .. ':notes', ARGV[2])
local new = redis.call('HGET', key, 'state')
if new == 'done' or new == 'failed' then
  redis.call('SREM', '"""
    + PREFIX
    + """host:' .. host .. ':orders', ARGV[1])
end
return 1
"""
)
