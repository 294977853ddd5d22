"""The Lua scripts of the record: each change compares, writes, counts and tells in one step."""

from tasks.keys import BELLS_KEPT, PREFIX
from tasks.state import MOVES, TERMINAL, State
from worker.settings import MEMORY_PER_SANDBOX

NO_RECORD = -2  # an answer of PUT
BROKEN = 3  # an answer of PUT: written, and the batch's rule cannot be met any more


def _names(states: "frozenset[State] | set[State]") -> str:
    return "{" + ",".join(f"['{state}']=true" for state in sorted(states)) + "}"


# What the scripts share. Keys are made here, by name: sandbatch needs one Redis, not a cluster.
COMMON = f"""
local P = '{PREFIX}'
local TERMINAL = {_names(TERMINAL)}
local LEAST_BYTES = {MEMORY_PER_SANDBOX}
local MOVES = {{{",".join(f"['{old}']={_names(set(news))}" for old, news in MOVES.items())}}}
""" + """
local function rec(id) return P .. 'sb:' .. id end
local function host_key(host, what) return P .. 'host:' .. host .. ':' .. what end

local function ring(where)
  redis.call('XADD', where, 'MAXLEN', '~', BELLS_KEPT, '*', 'look', '1')
end

local function tell(id, batch, state, host, at, kept)
  redis.call('XADD', P .. 'events', 'MAXLEN', '~', kept, '*',
             'id', id, 'batch', batch, 'state', state, 'host', host, 't', at)
end

-- Let a sandbox be taken; `now` is its place in the line. One that stands in line keeps its place.
local function offer(id, now)
  local line = redis.call('HGET', rec(id), 'line')
  redis.call('SADD', P .. 'lines', line)
  redis.call('ZADD', P .. 'line:' .. line, 'NX', now, id)
end

local function leave(id, line)
  redis.call('ZREM', P .. 'queued', id)
  redis.call('ZREM', P .. 'line:' .. line, id)
  if redis.call('EXISTS', P .. 'line:' .. line) == 0 then redis.call('SREM', P .. 'lines', line) end
end

-- Give a sandbox to a host; `bytes` of its memory are counted, nil: none.
local function claim(id, host, line, batch, bytes, at, kept)
  redis.call('HSET', rec(id), 'state', 'placed', 'host', host, 'placed_at', at)
  redis.call('SADD', host_key(host, 'sandboxes'), id)
  if bytes then redis.call('HSET', host_key(host, 'memory'), id, bytes) end
  leave(id, line or '')
  tell(id, batch or '', 'placed', host, at, kept)
end

-- Of a batch that holds some back: let as many go as its rule allows now.
local function release(batch, now)
  local key = P .. 'batch:' .. batch
  local max, waves, released, up, ended, stopped =
    unpack(redis.call('HMGET', key, 'max', 'waves', 'released', 'up', 'ended', 'cancelled'))
  if stopped or redis.call('EXISTS', key .. ':held') == 0 then return end
  released, up, ended = tonumber(released or 0), tonumber(up or 0), tonumber(ended or 0)
  local most = math.huge
  if max then most = tonumber(max) - (released - ended) end
  if waves then
    local size = 0
    local reached = nil
    for _, wave in ipairs(cjson.decode(waves)) do
      size = size + wave
      reached = wave
      if up < size then break end
    end
    while up >= size do size = size + reached end  -- the last wave's size goes on
    most = math.min(most, size - released)
  end
  local count = 0
  while count < most do
    local id = redis.call('LPOP', key .. ':held')
    if not id then break end
    redis.call('HDEL', rec(id), 'held')
    local state, counted = unpack(redis.call('HMGET', rec(id), 'state', 'up'))
    if state == 'queued' then  -- else it was cancelled meanwhile, and counted
      offer(id, now + count * 1e-6)
      count = count + 1
    elseif state and counted ~= '2' then  -- by a client of release 0.1.0
      redis.call('HINCRBY', key, 'released', 1)
      redis.call('SADD', P .. 'uncounted', id)
    end
  end
  if count > 0 then
    redis.call('HINCRBY', key, 'released', count)
    ring(P .. 'bell')
  end
end

-- The outcome of a batch, once all have ended; true if its rule cannot be met any more and it is to stop.
local function verdict(batch, at, expiry, kept)
  local key = P .. 'batch:' .. batch
  local fail_fast, cancelled, broken, outcome, open =
    unpack(redis.call('HMGET', key, 'fail_fast', 'cancelled', 'broken', 'outcome', 'open'))
  local total, ended, good, bad, needed =
    unpack(redis.call('HMGET', key, 'total', 'ended', 'good', 'bad', 'needed'))
  if not total or outcome or open then return false end
  total, ended, good, bad = tonumber(total), tonumber(ended or 0), tonumber(good or 0), tonumber(bad or 0)
  local least = tonumber(needed or total)
  if ended >= total then
    outcome = good >= least and 'succeeded' or 'failed'
    if cancelled and not broken then outcome = 'cancelled' end
    redis.call('HSET', key, 'outcome', outcome, 'ended_at', at)
    for _, part in ipairs({'', ':ids', ':held', ':images'}) do redis.call('EXPIRE', key .. part, expiry) end
    tell('', batch, outcome, '', at, kept)
    return false
  end
  if fail_fast and not cancelled and total - bad < least then
    redis.call('HSET', key, 'broken', '1')
    redis.call('SADD', P .. 'broken', batch)  -- should the asker die, the sweep does it
    return true
  end
  return false
end

-- Count a move of a sandbox for its batch; true as `verdict`.
local function account(id, state, at, expiry, kept, now)
  local batch, counted, held, reason, code, replaced = unpack(redis.call('HMGET', rec(id),
    'batch', 'up', 'held', 'reason', 'exit_code', 'replaced_by'))
  local key = P .. 'batch:' .. (batch or '')
  if not batch or replaced or redis.call('EXISTS', key) == 0 then return false end
  if not (state == 'running' or TERMINAL[state]) then return false end
  if not counted then
    redis.call('HSET', rec(id), 'up', '1')
    redis.call('HINCRBY', key, 'up', 1)
  end
  if TERMINAL[state] then
    redis.call('HSET', rec(id), 'up', '2')  -- its end is counted, too
    if held then redis.call('HINCRBY', key, 'released', 1) end
    redis.call('HINCRBY', key, 'ended', 1)
    local good = state == 'exited' and
      (code == '0' or reason == 'stop' or reason == 'ttl' or reason == 'rm')
    redis.call('HINCRBY', key, good and 'good' or 'bad', 1)
  end
  release(batch, now)
  return TERMINAL[state] and verdict(batch, at, expiry, kept)
end

local function drained(host)
  local wish = redis.call('HGET', P .. 'drains', host)
  return wish and cjson.decode(wish)['drained']
end
""".replace("BELLS_KEPT", str(BELLS_KEPT))

# ARGV: id, state, now (text), attempt, seq ('' = not from a journal), expiry of terminal records in s, length
# of the stream, the state that it must be in ('' = any), now (s), then field, value, ...
# Answers: 1 written, 0 nothing new, -1 fenced off (an older attempt, or no such move), NO_RECORD, BROKEN.
PUT = (
    COMMON
    + """
local id, target, at, attempt, seq = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local expiry, kept, only_from, now = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local state, old_attempt, old_seq = unpack(redis.call('HMGET', rec(id), 'state', 'attempt', 'seq'))
if not state then return -2 end
if only_from ~= '' and only_from ~= state then return -1 end
old_attempt = tonumber(old_attempt)
if attempt < old_attempt then return -1 end
if state == 'queued' and seq ~= '' then  -- the broker has lost that a host took it
  local line, batch, bytes = unpack(redis.call('HMGET', rec(id), 'line', 'batch', 'memory'))
  if not bytes or bytes == '0' then bytes = LEAST_BYTES end
  for number = 10, #ARGV, 2 do
    if ARGV[number] == 'host' then claim(id, ARGV[number + 1], line, batch, bytes, at, kept) end
  end
  state = 'placed'
elseif seq ~= '' and attempt == old_attempt and tonumber(seq) <= tonumber(old_seq or '0') then
  return 0
end
if target ~= state then
  local begins_anew = attempt > old_attempt and not TERMINAL[state]
  if not begins_anew and not MOVES[state][target] then return -1 end
end
redis.call('HSET', rec(id), 'state', target, 'attempt', attempt)
if seq ~= '' then redis.call('HSET', rec(id), 'seq', seq) end
if #ARGV > 9 then redis.call('HSET', rec(id), unpack(ARGV, 10)) end
local host, batch, line, stage, waits =
  unpack(redis.call('HMGET', rec(id), 'host', 'batch', 'line', 'stage', 'waits'))
if host then
  waits = target == 'launching' and waits == '1'  -- for its image: it holds no slot
  redis.call(waits and 'SADD' or 'SREM', host_key(host, 'waiting'), id)
  if not waits then redis.call('ZREM', host_key(host, 'fetched'), id) end
  local is_launch = not waits and (target == 'placed' or (target == 'launching' and stage ~= 'ready'))
  local left = not is_launch and redis.call('SREM', host_key(host, 'launching'), id) or 0
  if TERMINAL[target] then
    redis.call('HDEL', host_key(host, 'memory'), id)
    left = left + redis.call('SREM', host_key(host, 'sandboxes'), id)
  end
  if left > 0 then ring(P .. 'bell:' .. host) end
end
if target == state then return 1 end
if state == 'queued' then leave(id, line or '') end
if TERMINAL[target] then
  redis.call('HSETNX', rec(id), 'ended_at', at)
  redis.call('EXPIRE', rec(id), expiry)
  redis.call('DEL', P .. 'sealed:' .. id)  -- its values: whoever runs this may not read them
end
tell(id, batch or '', target, host or '', at, kept)
return account(id, target, at, expiry, kept, now) and 3 or 1
"""
)

# A host takes what fits into its room. All in one line need the same, so that each line is judged by its
# head, however many wait there: first those that are pinned to the host, then those that ask for its labels,
# then the others; of equals the line whose head has waited longest.
# ARGV: host, now (text), length of the stream, offer as JSON: capacity, slots, memory (0: not counted), each
# (bytes for one that asks for none), labels, rooms (of each network; -1: without a limit), kinds of specs,
# elder (a host of release 0.1.0, whose scripts free no memory and count for no batch), and where the host
# says so: owner (of its name), life (of the broker, which knows all that the host has: one that was
# restarted, or lost its data, counts too little), admits (it lets launches go on that waited for an image:
# they come first, also on a drained host, as they are its own and count in its capacity and memory), now (s);
# most to take.
# Answers: taken, admitted; each id, attempt, id, attempt, ...
TAKE = (
    COMMON
    + """
local HAS_LINKS = {egress=true, bundle=true, container=true}  -- the stages after `network`
local host, at, kept, have, most = ARGV[1], ARGV[2], ARGV[3], cjson.decode(ARGV[4]), tonumber(ARGV[5])
if have.owner and have.owner ~= redis.call('GET', host_key(host, 'owner')) then return {{}, {}} end
if have.life then
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  local epoch = redis.call('GET', P .. 'epoch')
  if not epoch or have.life ~= epoch .. '.' .. (run or '') then return {{}, {}} end
end
local held, launching = host_key(host, 'sandboxes'), host_key(host, 'launching')

local function use_rooms(nets)
  for net in string.gmatch(nets or '', '[^,]+') do
    local room = have.rooms[net]
    if room and room > 0 then have.rooms[net] = room - 1 end
  end
end

local under_way = 0
for _, id in ipairs(redis.call('SMEMBERS', launching)) do  -- what was lost there is mended here
  local state, stage, owner, nets, waits =
    unpack(redis.call('HMGET', rec(id), 'state', 'stage', 'host', 'nets', 'waits'))
  local is_launch = state == 'placed' or (state == 'launching' and stage ~= 'ready' and waits ~= '1')
  if owner == host and is_launch then
    under_way = under_way + 1
    if not HAS_LINKS[stage] then use_rooms(nets) end
  else
    redis.call('SREM', launching, id)
  end
end
for _, id in ipairs(redis.call('SMEMBERS', host_key(host, 'waiting'))) do  -- their addresses are promised
  local state, owner, nets, waits = unpack(redis.call('HMGET', rec(id), 'state', 'host', 'nets', 'waits'))
  if owner == host and state == 'launching' and waits == '1' then
    use_rooms(nets)
  else
    redis.call('SREM', host_key(host, 'waiting'), id)
  end
end

local admitted = {}
while have.admits and under_way < have.slots and #admitted < 2 * most do
  local id = redis.call('ZPOPMIN', host_key(host, 'fetched'))[1]
  if not id then break end
  local state, owner, waits, attempt =
    unpack(redis.call('HMGET', rec(id), 'state', 'host', 'waits', 'attempt'))
  if owner == host and state == 'launching' and waits == '1' then
    redis.call('SREM', host_key(host, 'waiting'), id)
    redis.call('SADD', launching, id)
    redis.call('HSET', rec(id), 'waits', '0', 'admitted_at', have.now)
    under_way = under_way + 1
    admitted[#admitted + 1] = id
    admitted[#admitted + 1] = attempt
  end
end
if drained(host) then return {{}, admitted} end
most = math.min(most, have.slots - under_way, have.capacity - redis.call('SCARD', held))
if most <= 0 then return {{}, admitted} end
local memory = math.huge
if have.memory > 0 then
  memory = have.memory
  for _, bytes in ipairs(redis.call('HVALS', host_key(host, 'memory'))) do
    memory = memory - tonumber(bytes)
  end
end
local kinds = {}
for _, kind in ipairs(have.kinds) do kinds[kind] = true end

-- 1, 2, 3: pinned to this host, for its labels, for any; nil: for others.
local function rank_of(where)
  if where == 'any' then return 3 end
  if string.sub(where, 1, 5) == 'host:' then return where == 'host:' .. host and 1 or nil end
  for name, value in string.gmatch(string.sub(where, 4) .. ',', '([^=,]+)=([^,]*),') do
    if have.labels[name] ~= value then return nil end
  end
  return 2
end

local function has_rooms(nets, is_pinned)
  for net in string.gmatch(nets, '[^,]+') do
    local room = have.rooms[net]  -- what is pinned where its network is not is taken, and fails with words
    if room == 0 or (room == nil and not is_pinned) then return false end
  end
  return true
end

local lines, pinned, shared = {}, 0, 0
for _, name in ipairs(redis.call('SMEMBERS', P .. 'lines')) do
  local where, kind, bytes, nets = string.match(name, '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
  local rank = where and kinds[kind] and rank_of(where)
  local needs = tonumber(bytes or 0)
  if needs == 0 then needs = have.each end
  if rank and needs <= memory and has_rooms(nets, rank == 1) then
    local head = redis.call('ZRANGE', P .. 'line:' .. name, 0, 0, 'WITHSCORES')
    if head[1] then
      lines[#lines + 1] = {name=name, rank=rank, since=tonumber(head[2]), needs=needs, nets=nets}
      local count = redis.call('ZCARD', P .. 'line:' .. name)
      if rank == 1 then pinned = pinned + count else shared = shared + count end
    end
  end
end

-- No more than its share in one look: the same bell has woken the others, and a few are to be spread, too.
local live = 0
for _, name in ipairs(redis.call('SMEMBERS', P .. 'hosts')) do
  live = live + redis.call('EXISTS', P .. 'host:' .. name)
end
most = math.min(most, pinned + math.ceil(shared / math.max(1, live)))

local taken = {}
while #taken < 2 * most do
  local best = nil
  for _, line in ipairs(lines) do
    if not line.done and (not best or line.rank < best.rank
        or (line.rank == best.rank and line.since < best.since)) then
      best = line
    end
  end
  if not best then break end
  local head = redis.call('ZRANGE', P .. 'line:' .. best.name, best.skip or 0, best.skip or 0, 'WITHSCORES')
  local id = head[1]
  if not id or best.needs > memory or not has_rooms(best.nets, best.rank == 1) then
    best.done = true
  else
    best.since = tonumber(head[2])
    local state, attempt, batch, removed, cancelled = unpack(redis.call('HMGET', rec(id),
      'state', 'attempt', 'batch', 'removed', 'cancel'))
    if state ~= 'queued' then  -- moved by a script of release 0.1.0
      leave(id, best.name)
      redis.call('SADD', P .. 'uncounted', id)
    elseif removed or cancelled then  -- whoever marked it is about to end it
      best.skip = (best.skip or 0) + 1
    else
      local bytes = best.needs
      if have.elder then
        redis.call('SADD', P .. 'uncounted', id)
        bytes = nil
      end
      redis.call('SADD', launching, id)
      claim(id, host, best.name, batch, bytes, at, kept)
      memory = memory - best.needs
      use_rooms(best.nets)
      taken[#taken + 1] = id
      taken[#taken + 1] = attempt
    end
  end
end
return {taken, admitted}
"""
)

# Put sandboxes of the records in their lines. ARGV: now (s), id, ...
OFFER = (
    COMMON
    + """
for number = 2, #ARGV do
  local id = ARGV[number]
  if redis.call('HGET', rec(id), 'state') == 'queued' then offer(id, ARGV[1] + number * 1e-6) end
  redis.call('ZREM', P .. 'queued', id)
end
ring(P .. 'bell')
"""
)

# All of a batch is written: what it holds back may go as its rule says.
# ARGV: batch, now (text), now (s), expiry, length of the stream.
CLOSE = (
    COMMON
    + """
redis.call('HDEL', P .. 'batch:' .. ARGV[1], 'open')
redis.call('ZREM', P .. 'open', ARGV[1])
release(ARGV[1], ARGV[3])
return verdict(ARGV[1], ARGV[2], ARGV[4], ARGV[5]) and 3 or 1
"""
)

# Count for their batches what scripts of release 0.1.0 have moved; harmless to repeat.
# ARGV: now (text), now (s), expiry, length of the stream, id, ...
COUNT = (
    COMMON
    + """
for number = 5, #ARGV do
  local id = ARGV[number]
  local state, counted = unpack(redis.call('HMGET', rec(id), 'state', 'up'))
  local has_ended = not state or TERMINAL[state]
  if state and (has_ended and counted ~= '2' or state == 'running' and not counted) then
    account(id, state, ARGV[1], ARGV[3], ARGV[4], ARGV[2])
  end
  if has_ended then redis.call('SREM', P .. 'uncounted', id) end
end
"""
)

# ARGV: id, field, value.
# Only where there is one: a field by itself would make a record without an end.
MARK = f"""
local key = '{PREFIX}sb:' .. ARGV[1]
if redis.call('EXISTS', key) == 1 then redis.call('HSET', key, ARGV[2], ARGV[3]) end
"""
