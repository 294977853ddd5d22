"""The Lua scripts of the record: each change compares, writes and tells in one step."""

import json

from tasks.state import MOVES, TERMINAL

MOVES_JSON = json.dumps({str(old): [str(new) for new in news] for old, news in MOVES.items()})
TERMINAL_JSON = json.dumps([str(state) for state in TERMINAL])
NO_RECORD = -2  # an answer of PUT

# KEYS: record, events, sandboxes of the host, queued.  ARGV: id, state to come, now, moves, terminal states,
# attempt, seq ('' = not from a journal), expiry of terminal records in s, length of the stream, the
# state that it must be in ('' = any), then field, value, ...
# Answers: 1 written, 0 nothing new, -1 fenced off (an older attempt, or no such move), -2 no such record.
PUT = """
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
"""

# KEYS: record, events, sandboxes of the host, queued.  ARGV: id, host, attempt, now, length of the stream.
# Answers: 1 claimed, 2 was mine already, 0 not to be had.
CLAIM = """
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
"""

# KEYS: record.  ARGV: field, value.
# Only where there is one: a field by itself would make a record without an end.
MARK = "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end"

# KEYS: owner of a host's name.  ARGV: owner, seconds.
NAME = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""
