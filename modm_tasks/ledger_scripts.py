"""The ledger's moves as Lua. Each script is one compare-and-set: it checks the state (and, for a worker, the attempt),
changes every index with it, counts the event in the observation window and tells the listeners.

Time is the Redis clock throughout, so clock skew between processes changes neither leases nor latencies.
Keys are computed from one prefix, so Redis Cluster is not supported; a managed or Sentinel Redis is.
Replies: an ``ok``/error word first, then what the script has to say.
"""

from __future__ import annotations

from modm_tasks.ledger_prelude import PRELUDE

#: id, request JSON, arrival_s ('' = now), client, idempotency key, max_open, max_client_open, slo_s, rank offset
ACCEPT = (
    PRELUDE
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
local rank = fmt(now + tonumber(ARGV[9]))
redis.call('HSET', key(id), 'id', id, 'state', 'accepted', 'request', ARGV[2], 'client', client, 'attempt', 0,
  'tries', 0, 'arrival_s', fmt(arrival), 'accepted_s', fmt(now), 'rank', rank, 'slo_s', ARGV[8],
  'log', fmt(now) .. ' accepted \\n')
redis.call('ZADD', P .. 'open', now, id)
redis.call('ZADD', P .. 'accepted', now, id)
if idem ~= '' then redis.call('SET', P .. 'idem:' .. client .. ':' .. idem, id, 'EX', 86400) end
count('arrivals')
local slo = tonumber(ARGV[8]) or 0
if slo > 0 then count('deadlines'); count('deadline_sum', slo) end
redis.call('PUBLISH', P .. 'events', cjson.encode({id=id, state='accepted', at=fmt(now)}))
return {'ok', id, fmt(arrival), fmt(now), rank}
"""
)

#: id, expected state, queue, decision JSON, skipped steps, source id, note, text vector and rank ('' = unchanged)
ROUTE = (
    PRELUDE
    + """
local id, expected, queue = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', key(id), 'state') ~= expected then return {'conflict'} end
local was, was_k = redis.call('HGET', key(id), 'queue'), 0
if expected == 'queued' then
  -- One that is to be drawn anew keeps that: what it has is the refined image already.
  if redis.call('HEXISTS', key(id), 'fallback') == 1 then return {'conflict'} end
  was_k = cjson.decode(redis.call('HGET', key(id), 'decision')).skipped_steps
end
if ARGV[9] ~= '' then redis.call('HSET', key(id), 'rank', ARGV[9]) end
local r = enqueue(id, queue, ARGV[7])
if r ~= 'ok' then return {r} end
redis.call('HSET', key(id), 'decision', ARGV[4])
source(id, ARGV[6])
if ARGV[8] ~= '' then redis.call('HSET', key(id), 'tvec', ARGV[8]) end
if queue == 'small-refine' then count('hits') else count('misses') end
if expected == 'queued' then
  count('rebound')
  if was == 'small-refine' then count('hits', -1); count('k:' .. was_k, -1) else count('misses', -1) end
end
if queue == 'small-refine' then count('k:' .. ARGV[5]) end
return {'ok'}
"""
)

#: id, source id, decision JSON, wait until (Unix s, 0 = no bound), text vector
WAIT = (
    PRELUDE
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

#: id, completion JSON: an exact repeat answered with a stored image, from accepted or waiting straight to done
FINISH_STORED = (
    PRELUDE
    + """
local id = ARGV[1]
local state = redis.call('HGET', key(id), 'state')
if state ~= 'accepted' and state ~= 'waiting' then return {'conflict'} end
redis.call('HSET', key(id), 'completion', ARGV[2], 'decision', ARGV[3], 'admitted_s', fmt(now), 'claimed_s', fmt(now),
  'queued_s', fmt(now))
local r = move(id, 'done', 'stored')
count('stored')
return {r}
"""
)

#: id, new state (cancelled | failed | refused), error: by the front, for a request that no worker holds
END = (
    PRELUDE
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
    PRELUDE
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
      if fall_back(id, 'attempts spent') then
        out[#out + 1] = {id, 'done', ''}
      else
        move(id, 'failed', 'attempts spent')
        out[#out + 1] = {id, 'failed', ''}
      end
    else
      count('retries')
      -- From the second death on it goes to the end of the line: a request that kills workers must not do so in a row,
      -- and one that was near a killer by chance gets another neighbour.
      -- Ranks by deadline lie in the future: the end is behind the last of them, not now.
      local queue = redis.call('HGET', key(id), 'queue')
      if tries >= 2 then
        local last = redis.call('ZREVRANGE', P .. 'ready:' .. queue, 0, 0, 'WITHSCORES')[2]
        redis.call('HSET', key(id), 'rank', fmt(math.max(now, tonumber(last or '0') + 0.001)))
      end
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
    PRELUDE
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
    PRELUDE
    + """
local id = ARGV[1]
if redis.call('HGET', key(id), 'state') ~= 'failed' then return {'conflict'} end
redis.call('HSET', key(id), 'state', 'accepted', 'tries', 0, 'rank', fmt(now))
redis.call('HDEL', key(id), 'done_s', 'error', 'queued_s', 'claimed_s', 'cancel')
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

#: keep newer than (Unix s), keep at most, limit: forget finished requests; returns the ids and URIs forgotten. What may
#: not go yet (not admitted, a source in use) is passed over, or a few of those at the front would keep everything.
TRIM = (
    PRELUDE
    + """
local limit = tonumber(ARGV[3])
local before = now - tonumber(ARGV[1])
local over = redis.call('ZCARD', P .. 'finished') - tonumber(ARGV[2])
local out, first, seen = {}, 0, 0
while #out < limit and seen < 20 * limit do
  local rows = redis.call('ZRANGE', P .. 'finished', first, first + limit - 1, 'WITHSCORES')
  if #rows == 0 then break end
  for i = 1, #rows, 2 do
    local id = rows[i]
    seen = seen + 1
    if #out == limit or (tonumber(rows[i + 1]) > before and #out >= over) then return out end
    if redis.call('ZSCORE', P .. 'unadmitted', id) == false and redis.call('HGET', P .. 'sources', id) == false then
      out[#out + 1] = {id, redis.call('HGET', key(id), 'completion') or ''}
      redis.call('DEL', key(id), P .. 'waiters:' .. id)
      redis.call('ZREM', P .. 'finished', id); redis.call('ZREM', P .. 'failed', id)
    else
      first = first + 1
    end
  end
end
return out
"""
)
