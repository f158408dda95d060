"""The ledger's moves as Lua. Each script is one compare-and-set: it checks the state (and, for a worker, the attempt),
changes every index with it, counts the event in the observation window and tells the listeners.

Time is the Redis clock throughout, so clock skew between processes changes neither leases nor latencies.
Keys are computed from one prefix, so Redis Cluster is not supported; a managed or Sentinel Redis is.
Replies: an ``ok``/error word first, then what the script has to say.
"""

from __future__ import annotations

from modm_tasks.ledger_states import lua_table

_PRELUDE = (
    "local MOVES = "
    + lua_table()
    + """
local P = KEYS[1]
local t = redis.call('TIME')
local now = tonumber(t[1]) + tonumber(t[2]) / 1000000
local function key(id) return P .. 'req:' .. id end
local function fmt(x) return string.format('%.6f', x) end
local BUCKET = tonumber(redis.call('HGET', P .. 'control', 'bucket_s') or '10')
local function count(field, by)
  local w = P .. 'win:' .. string.format('%d', math.floor(now / BUCKET))
  redis.call('HINCRBYFLOAT', w, field, by or 1)
  redis.call('EXPIRE', w, 7200)
end
local function leave(id, state)
  if state == 'accepted' then redis.call('ZREM', P .. 'accepted', id)
  elseif state == 'queued' then redis.call('ZREM', P .. 'ready:' .. (redis.call('HGET', key(id), 'queue') or ''), id)
  elseif state == 'running' then redis.call('ZREM', P .. 'running', id)
  elseif state == 'waiting' then
    redis.call('ZREM', P .. 'waiting', id)
    local src = redis.call('HGET', key(id), 'waits_on')
    if src then redis.call('SREM', P .. 'waiters:' .. src, id) end
    redis.call('HDEL', key(id), 'waits_on')
  end
end
local function finalise(id, state)
  redis.call('ZREM', P .. 'open', id)
  redis.call('ZADD', P .. 'finished', now, id)
  redis.call('HSET', key(id), 'done_s', fmt(now))
  local client = redis.call('HGET', key(id), 'client')
  if client and client ~= '' then
    if redis.call('HINCRBY', P .. 'client_open', client, -1) <= 0 then
      redis.call('HDEL', P .. 'client_open', client)
    end
  end
  local src = redis.call('HGET', key(id), 'source_id')
  if src then
    if redis.call('HINCRBY', P .. 'sources', src, -1) <= 0 then redis.call('HDEL', P .. 'sources', src) end
  end
  count(state)
  local arrival = tonumber(redis.call('HGET', key(id), 'arrival_s') or '0')
  if state == 'done' or state == 'failed' then
    local slo = tonumber(redis.call('HGET', key(id), 'slo_s') or '0')
    count('latency_sum', now - arrival)
    if slo > 0 then
      count('slo_total')
      if state == 'failed' or now - arrival > slo then count('slo_missed') end
    end
  end
  if state == 'failed' then redis.call('ZADD', P .. 'failed', now, id) end
end
local FINAL = {done=true, failed=true, cancelled=true, refused=true}
local function move(id, new, note)
  local old = redis.call('HGET', key(id), 'state')
  if not old then return 'missing' end
  if not MOVES[old .. '>' .. new] then return old end
  leave(id, old)
  redis.call('HSET', key(id), 'state', new)
  local log = redis.call('HGET', key(id), 'log') or ''
  if #log < 8000 then
    redis.call('HSET', key(id), 'log', log .. fmt(now) .. ' ' .. new .. ' ' .. (note or '') .. '\\n')
  end
  if FINAL[new] then finalise(id, new) end
  redis.call('PUBLISH', P .. 'events', cjson.encode({id=id, state=new, at=fmt(now)}))
  return 'ok'
end
local function source(id, src)
  local old = redis.call('HGET', key(id), 'source_id')
  if old and redis.call('HINCRBY', P .. 'sources', old, -1) <= 0 then redis.call('HDEL', P .. 'sources', old) end
  if src and src ~= '' then
    redis.call('HINCRBY', P .. 'sources', src, 1)
    redis.call('HSET', key(id), 'source_id', src)
  else
    redis.call('HDEL', key(id), 'source_id')
  end
end
local function enqueue(id, queue, note)
  local r = move(id, 'queued', note)
  if r ~= 'ok' then return r end
  redis.call('HSET', key(id), 'queue', queue)
  redis.call('HSETNX', key(id), 'queued_s', fmt(now))
  redis.call('ZADD', P .. 'ready:' .. queue, redis.call('HGET', key(id), 'rank'), id)
  return 'ok'
end
"""
)

#: id, request JSON, arrival_s ('' = now), client, idempotency key, max_open, max_client_open, slo_s, rank offset
ACCEPT = (
    _PRELUDE
    + """
local id, client, idem = ARGV[1], ARGV[4], ARGV[5]
if idem ~= '' then
  local known = redis.call('GET', P .. 'idem:' .. client .. ':' .. idem)
  if known and redis.call('EXISTS', key(known)) == 1 then return {'known', known} end
end
if redis.call('EXISTS', key(id)) == 1 then return {'known', id} end
if redis.call('ZCARD', P .. 'open') >= tonumber(ARGV[6]) then count('refused'); return {'full', 'open'} end
if client ~= '' then
  local bound = tonumber(ARGV[7])
  if bound > 0 and tonumber(redis.call('HGET', P .. 'client_open', client) or '0') >= bound then
    count('refused'); return {'full', 'client'}
  end
  redis.call('HINCRBY', P .. 'client_open', client, 1)
end
local arrival = now
if ARGV[3] ~= '' then arrival = tonumber(ARGV[3]) end
redis.call('HSET', key(id), 'id', id, 'state', 'accepted', 'request', ARGV[2], 'client', client, 'attempt', 0,
  'tries', 0, 'arrival_s', fmt(arrival), 'accepted_s', fmt(now), 'rank', fmt(now + tonumber(ARGV[9])), 'slo_s', ARGV[8],
  'log', fmt(now) .. ' accepted \\n')
redis.call('ZADD', P .. 'open', now, id)
redis.call('ZADD', P .. 'accepted', now, id)
if idem ~= '' then redis.call('SET', P .. 'idem:' .. client .. ':' .. idem, id, 'EX', 86400) end
count('arrivals')
redis.call('PUBLISH', P .. 'events', cjson.encode({id=id, state='accepted', at=fmt(now)}))
return {'ok', id}
"""
)

#: id, expected state, queue, decision JSON, skipped steps, source id, note, text vector and rank ('' = unchanged)
ROUTE = (
    _PRELUDE
    + """
local id, expected, queue = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', key(id), 'state') ~= expected then return {'conflict'} end
if ARGV[9] ~= '' then redis.call('HSET', key(id), 'rank', ARGV[9]) end
local r = enqueue(id, queue, ARGV[7])
if r ~= 'ok' then return {r} end
redis.call('HSET', key(id), 'decision', ARGV[4])
source(id, ARGV[6])
if ARGV[8] ~= '' then redis.call('HSET', key(id), 'tvec', ARGV[8]) end
if queue == 'small-refine' then count('hits') else count('misses') end
if expected == 'queued' then
  count('rebound')
  count('misses', -1)
end
if queue == 'small-refine' then count('k:' .. ARGV[5]) end
return {'ok'}
"""
)

#: id, source id, decision JSON, wait until (Unix s, 0 = no bound), text vector
WAIT = (
    _PRELUDE
    + """
local id, src = ARGV[1], ARGV[2]
local s = redis.call('HGET', key(src), 'state')
if not s or (FINAL[s] and (s ~= 'done' or redis.call('HEXISTS', key(src), 'admitted_s') == 1)) then return {'ended'} end
local r = move(id, 'waiting', 'on ' .. src)
if r ~= 'ok' then return {r} end
redis.call('HSET', key(id), 'waits_on', src, 'decision', ARGV[3])
if ARGV[5] ~= '' then redis.call('HSET', key(id), 'tvec', ARGV[5]) end
redis.call('SADD', P .. 'waiters:' .. src, id)
redis.call('ZADD', P .. 'waiting', ARGV[4], id)
count('waited')
return {'ok'}
"""
)

#: queue, worker, lease_s
CLAIM = (
    _PRELUDE
    + """
local ready = P .. 'ready:' .. ARGV[1]
while true do
  local head = redis.call('ZRANGE', ready, 0, 0)
  if #head == 0 then return {'empty'} end
  local id = head[1]
  if redis.call('HGET', key(id), 'state') ~= 'queued' then
    redis.call('ZREM', ready, id)
  else
    move(id, 'running', ARGV[2])
    redis.call('HINCRBY', key(id), 'attempt', 1)
    redis.call('HINCRBY', key(id), 'tries', 1)
    redis.call('HSET', key(id), 'worker', ARGV[2], 'claimed_s', fmt(now), 'step', 0)
    redis.call('ZADD', P .. 'running', now + tonumber(ARGV[3]), id)
    return {'ok', id, redis.call('HGETALL', key(id))}
  end
end
"""
)

_OWNED = """
local id, attempt = ARGV[1], ARGV[2]
if redis.call('HGET', key(id), 'state') ~= 'running' or redis.call('HGET', key(id), 'attempt') ~= attempt then
  return {'lost'}
end
"""

#: id, attempt, lease_s, step
RENEW = (
    _PRELUDE
    + _OWNED
    + """
redis.call('ZADD', P .. 'running', now + tonumber(ARGV[3]), id)
if ARGV[4] ~= '' and redis.call('HGET', key(id), 'step') ~= ARGV[4] then
  redis.call('HSET', key(id), 'step', ARGV[4])
  redis.call('PUBLISH', P .. 'events', cjson.encode({id=id, state='running', step=tonumber(ARGV[4]), at=fmt(now)}))
end
if redis.call('HEXISTS', key(id), 'cancel') == 1 then return {'cancelled'} end
return {'ok'}
"""
)

#: id, attempt, completion JSON (without vector), vector, model, steps run, gpu_s
FINISH = (
    _PRELUDE
    + _OWNED
    + """
redis.call('HSET', key(id), 'completion', ARGV[3], 'ivec', ARGV[4])
move(id, 'done', '')
redis.call('ZADD', P .. 'unadmitted', now, id)
local m = 'model:' .. ARGV[5]
count(m .. ':n'); count(m .. ':steps', ARGV[6]); count(m .. ':gpu_s', ARGV[7])
redis.call('HSET', P .. 'step_s', ARGV[5], string.format('%.6f',
  0.8 * tonumber(redis.call('HGET', P .. 'step_s', ARGV[5]) or ARGV[7] / math.max(1, tonumber(ARGV[6])))
  + 0.2 * ARGV[7] / math.max(1, tonumber(ARGV[6]))))
return {'ok'}
"""
)

#: id, completion JSON: an exact repeat answered with a stored image, from accepted straight to done
FINISH_STORED = (
    _PRELUDE
    + """
local id = ARGV[1]
if redis.call('HGET', key(id), 'state') ~= 'accepted' then return {'conflict'} end
redis.call('HSET', key(id), 'completion', ARGV[2], 'decision', ARGV[3], 'admitted_s', fmt(now), 'claimed_s', fmt(now),
  'queued_s', fmt(now))
local r = move(id, 'done', 'stored')
count('stored')
return {r}
"""
)

#: id, attempt, error, retry (0/1), max tries
FAIL = (
    _PRELUDE
    + _OWNED
    + """
redis.call('HSET', key(id), 'error', ARGV[3])
if ARGV[4] == '1' and tonumber(redis.call('HGET', key(id), 'tries')) < tonumber(ARGV[5]) then
  count('retries')
  enqueue(id, redis.call('HGET', key(id), 'queue'), 'again: ' .. ARGV[3])
  return {'queued', redis.call('HGET', key(id), 'queue')}
end
move(id, 'failed', ARGV[3])
return {'failed'}
"""
)

#: id, attempt: back at the old rank, the try not counted
GIVE_BACK = (
    _PRELUDE
    + _OWNED
    + """
redis.call('HINCRBY', key(id), 'tries', -1)
enqueue(id, redis.call('HGET', key(id), 'queue'), 'given back')
return {'ok', redis.call('HGET', key(id), 'queue')}
"""
)

#: id, attempt, decision JSON, note, extra field, extra value: queued as a miss
REROUTE = (
    _PRELUDE
    + _OWNED
    + """
redis.call('HINCRBY', key(id), 'tries', -1)
local r = enqueue(id, 'large-gen', ARGV[4])
redis.call('HSET', key(id), 'decision', ARGV[3])
source(id, '')
if ARGV[5] ~= '' then redis.call('HSET', key(id), ARGV[5], ARGV[6]) end
count('rerouted')
return {r}
"""
)

#: id, attempt: stopped at a step boundary
FINISH_CANCELLED = (
    _PRELUDE
    + _OWNED
    + """
return {move(id, 'cancelled', 'at a step')}
"""
)

#: id, new state (cancelled | failed | refused), error: by the front, for a request that no worker holds
END = (
    _PRELUDE
    + """
local id, new = ARGV[1], ARGV[2]
local state = redis.call('HGET', key(id), 'state')
if not state then return {'missing'} end
if state == 'running' then
  if new ~= 'cancelled' then return {'running'} end
  redis.call('HSET', key(id), 'cancel', 1)
  redis.call('PUBLISH', P .. 'cancels', id)
  return {'asked'}
end
if FINAL[state] then return {state} end
if ARGV[3] ~= '' then redis.call('HSET', key(id), 'error', ARGV[3]) end
return {move(id, new, ARGV[3])}
"""
)

#: max tries, limit: claims whose lease ran out
EXPIRE = (
    _PRELUDE
    + """
local out = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'running', '-inf', now, 'LIMIT', 0, ARGV[2])) do
  if redis.call('HGET', key(id), 'state') ~= 'running' then
    redis.call('ZREM', P .. 'running', id)
  else
    local tries = tonumber(redis.call('HGET', key(id), 'tries'))
    local worker = redis.call('HGET', key(id), 'worker') or '?'
    if redis.call('HEXISTS', key(id), 'cancel') == 1 then
      move(id, 'cancelled', 'worker gone')
      out[#out + 1] = {id, 'cancelled', ''}
    elseif tries >= tonumber(ARGV[1]) then
      redis.call('HSET', key(id), 'error', 'the worker died ' .. tries .. ' times while drawing it; last: ' .. worker)
      move(id, 'failed', 'attempts spent')
      out[#out + 1] = {id, 'failed', ''}
    else
      count('retries')
      -- From the second death on it goes to the end of the line: a request that kills workers must not do so in a row,
      -- and one that was near a killer by chance gets another neighbour.
      if tries >= 2 then redis.call('HSET', key(id), 'rank', fmt(now)) end
      local queue = redis.call('HGET', key(id), 'queue')
      enqueue(id, queue, 'lease of ' .. worker .. ' expired')
      out[#out + 1] = {id, 'queued', queue}
    end
  end
end
return out
"""
)

#: id, clip score ('' = none): the image is in the cache (or need not be)
ADMITTED = (
    _PRELUDE
    + """
local id = ARGV[1]
if redis.call('ZREM', P .. 'unadmitted', id) == 0 then return {'known'} end
redis.call('HSET', key(id), 'admitted_s', fmt(now))
if ARGV[2] ~= '' then
  redis.call('HSET', key(id), 'clip_score', ARGV[2])
  count('clip_sum', ARGV[2]); count('clip_n')
end
redis.call('HDEL', key(id), 'tvec', 'ivec')
redis.call('DEL', P .. 'waiters:' .. id)
redis.call('PUBLISH', P .. 'events', cjson.encode({id=id, state='done', admitted=true, at=fmt(now)}))
return {'ok'}
"""
)

#: id: a failed request starts again, by an operator
RETRY = (
    _PRELUDE
    + """
local id = ARGV[1]
if redis.call('HGET', key(id), 'state') ~= 'failed' then return {'conflict'} end
redis.call('HSET', key(id), 'state', 'accepted', 'tries', 0, 'rank', fmt(now))
redis.call('HDEL', key(id), 'done_s', 'error', 'queued_s', 'claimed_s')
redis.call('ZREM', P .. 'failed', id); redis.call('ZREM', P .. 'finished', id)
redis.call('ZADD', P .. 'open', now, id); redis.call('ZADD', P .. 'accepted', now, id)
local client = redis.call('HGET', key(id), 'client')
if client and client ~= '' then redis.call('HINCRBY', P .. 'client_open', client, 1) end
local log = redis.call('HGET', key(id), 'log') or ''
redis.call('HSET', key(id), 'log', log .. fmt(now) .. ' accepted retried by an operator\\n')
redis.call('PUBLISH', P .. 'events', cjson.encode({id=id, state='accepted', at=fmt(now)}))
return {'ok'}
"""
)

#: keep newer than (Unix s), keep at most, limit: forget finished requests; returns the ids and URIs forgotten
TRIM = (
    _PRELUDE
    + """
local ids = redis.call('ZRANGEBYSCORE', P .. 'finished', '-inf', now - tonumber(ARGV[1]), 'LIMIT', 0, ARGV[3])
local over = redis.call('ZCARD', P .. 'finished') - tonumber(ARGV[2])
if #ids == 0 and over > 0 then ids = redis.call('ZRANGE', P .. 'finished', 0, math.min(over, tonumber(ARGV[3])) - 1) end
local out = {}
for _, id in ipairs(ids) do
  if redis.call('ZSCORE', P .. 'unadmitted', id) == false and redis.call('HGET', P .. 'sources', id) == false then
    out[#out + 1] = {id, redis.call('HGET', key(id), 'completion') or ''}
    redis.call('DEL', key(id), P .. 'waiters:' .. id)
    redis.call('ZREM', P .. 'finished', id); redis.call('ZREM', P .. 'failed', id)
  end
end
return out
"""
)
