"""The moves that a worker makes: claim, renew, finish, fail, give back. All but the claim check the attempt first."""

from __future__ import annotations

from modm_tasks.ledger_prelude import PRELUDE

#: queue, worker, lease_s
CLAIM = (
    PRELUDE
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

#: What would put the request back ends it instead where its user has cancelled it since the last renewal.
_UNLESS_CANCELLED = """
if redis.call('HEXISTS', key(id), 'cancel') == 1 then
  move(id, 'cancelled', 'its attempt ended')
  return {'cancelled'}
end
"""

#: id, attempt, lease_s, step
RENEW = (
    PRELUDE
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

#: id, attempt, completion JSON (without vector), vector, model, steps run, gpu_s, device name (or '')
FINISH = (
    PRELUDE
    + _OWNED
    + """
redis.call('HSET', key(id), 'completion', ARGV[3], 'ivec', ARGV[4])
move(id, 'done', '')
redis.call('ZADD', P .. 'unadmitted', now, id)
local m = 'model:' .. ARGV[5]
count(m .. ':n'); count(m .. ':steps', ARGV[6]); count(m .. ':gpu_s', ARGV[7])
local took = ARGV[7] / math.max(1, tonumber(ARGV[6]))
local function learn(table, field)
  redis.call('HSET', P .. table, field,
    string.format('%.6f', 0.8 * tonumber(redis.call('HGET', P .. table, field) or took) + 0.2 * took))
end
learn('step_s', ARGV[5])
if ARGV[8] ~= '' then learn('device_step_s', ARGV[5] .. '\t' .. ARGV[8]) end
return {'ok'}
"""
)

#: id, attempt, error, retry (0/1), max tries
FAIL = (
    PRELUDE
    + _OWNED
    + _UNLESS_CANCELLED
    + """
redis.call('HSET', key(id), 'error', ARGV[3])
if ARGV[4] == '1' and tonumber(redis.call('HGET', key(id), 'tries')) < tonumber(ARGV[5]) then
  count('retries')
  enqueue(id, redis.call('HGET', key(id), 'queue'), 'again: ' .. ARGV[3])
  return {'queued', redis.call('HGET', key(id), 'queue')}
end
if fall_back(id, ARGV[3]) then return {'done'} end
move(id, 'failed', ARGV[3])
return {'failed'}
"""
)

#: id, attempt: back at the old rank, the try not counted
GIVE_BACK = (
    PRELUDE
    + _OWNED
    + _UNLESS_CANCELLED
    + """
redis.call('HINCRBY', key(id), 'tries', -1)
enqueue(id, redis.call('HGET', key(id), 'queue'), 'given back')
return {'queued'}
"""
)

#: id, attempt, decision JSON, note, completion JSON of the image so far (or ''), its vector: queued as a miss
REROUTE = (
    PRELUDE
    + _OWNED
    + _UNLESS_CANCELLED
    + """
redis.call('HINCRBY', key(id), 'tries', -1)
enqueue(id, 'large-gen', ARGV[4])
redis.call('HSET', key(id), 'decision', ARGV[3])
source(id, '')
count('rerouted')
if ARGV[5] ~= '' then
  redis.call('HSET', key(id), 'fallback', ARGV[5], 'fallback_ivec', ARGV[6])
  count('escalated')
end
return {'queued'}
"""
)

#: id, attempt: stopped at a step boundary
FINISH_CANCELLED = (
    PRELUDE
    + _OWNED
    + """
return {move(id, 'cancelled', 'at a step')}
"""
)
