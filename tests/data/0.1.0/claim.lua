local state = redis.call('HGET', KEYS[1], 'state')
local attempt = redis.call('HGET', KEYS[1], 'attempt')
if not state or attempt ~= ARGV[3] or redis.call('HGET', KEYS[1], 'removed') then return 0 end
if state == 'placed' and redis.call('HGET', KEYS[1], 'host') == ARGV[2] then return 2 end
if state ~= 'queued' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'placed', 'host', ARGV[2], 'placed_at', ARGV[4])
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'id', ARGV[1],
           'batch', redis.call('HGET', KEYS[1], 'batch') or '', 'state', 'placed',
           'host', ARGV[2], 't', ARGV[4])
return 1
