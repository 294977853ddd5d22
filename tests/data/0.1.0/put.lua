local state = redis.call('HGET', KEYS[1], 'state')
if not state then return -2 end
if ARGV[10] ~= '' and ARGV[10] ~= state then return -1 end
local attempt = tonumber(redis.call('HGET', KEYS[1], 'attempt'))
if tonumber(ARGV[6]) < attempt then return -1 end
if ARGV[7] ~= '' then
  local seq = tonumber(redis.call('HGET', KEYS[1], 'seq') or '0')
  if tonumber(ARGV[6]) == attempt and tonumber(ARGV[7]) <= seq then return 0 end
end
local target = ARGV[2]
local terminal_now = false
for _, name in ipairs(cjson.decode(ARGV[5])) do
  if name == state then terminal_now = true end
end
if target ~= state then
  local allowed = tonumber(ARGV[6]) > attempt and not terminal_now  -- a new attempt begins anew
  for _, move in ipairs(cjson.decode(ARGV[4])[state]) do
    if move == target then allowed = true end
  end
  if not allowed then return -1 end
end
redis.call('HSET', KEYS[1], 'state', target, 'attempt', ARGV[6])
if ARGV[7] ~= '' then redis.call('HSET', KEYS[1], 'seq', ARGV[7]) end
for i = 11, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
if target ~= state then
  redis.call('ZREM', KEYS[4], ARGV[1])
  local host = redis.call('HGET', KEYS[1], 'host') or ''
  local batch = redis.call('HGET', KEYS[1], 'batch') or ''
  local terminal = false
  for _, name in ipairs(cjson.decode(ARGV[5])) do
    if name == target then terminal = true end
  end
  if terminal then
    redis.call('HSETNX', KEYS[1], 'ended_at', ARGV[3])
    redis.call('EXPIRE', KEYS[1], ARGV[8])
    redis.call('SREM', KEYS[3], ARGV[1])
  end
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[9], '*',
             'id', ARGV[1], 'batch', batch, 'state', target, 'host', host, 't', ARGV[3])
end
return 1
