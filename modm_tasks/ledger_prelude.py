"""What every script of the ledger begins with: the state machine, and the one function that moves a request."""

from __future__ import annotations

from modm_tasks.ledger_states import lua_table

PRELUDE = (
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
    redis.call('HDEL', key(id), 'source_id') -- a retry must not release it a second time
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
    local line = string.gsub(note or '', '%c', ' ') -- one transition, one line, whatever an error says
    redis.call('HSET', key(id), 'log', log .. fmt(now) .. ' ' .. new .. ' ' .. line .. '\\n')
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
-- Where a drawing anew has failed for good, the refined image that it was to replace is the answer. False without one.
local function fall_back(id, why)
  local kept = redis.call('HGET', key(id), 'fallback')
  if not kept or move(id, 'done', 'the refined image after all: ' .. why) ~= 'ok' then return false end
  redis.call('HSET', key(id), 'completion', kept, 'ivec', redis.call('HGET', key(id), 'fallback_ivec') or '')
  redis.call('ZADD', P .. 'unadmitted', now, id)
  return true
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
