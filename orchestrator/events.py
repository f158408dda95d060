"""Server-sent events of one request: what the ledger publishes, forwarded until the request has ended."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import redis.asyncio
from starlette.concurrency import run_in_threadpool

from modm_tasks.messages import FINAL, RequestRecord
from modm_tasks.redis_client import redis_url
from orchestrator.service import Service

KEEPALIVE_S = 10.0


def sse(event: str, data: object) -> str:
    """One event in the wire format."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def _state(record: RequestRecord, service: Service) -> dict[str, object]:
    queue = record.decision.route.value if record.decision else None
    position = service.ledger.position(record.id, queue) if queue and record.state.value == "queued" else None
    return {
        "id": record.id,
        "state": record.state.value,
        "step": record.step,
        "position": position,
        "route": queue,
        "error": record.error,
    }


async def follow(service: Service, request_id: str, disconnected: Callable[[], Awaitable[bool]]) -> AsyncIterator[str]:
    """First the present state, then each change. Listens before it looks, so that nothing falls between."""
    client = redis.asyncio.Redis.from_url(redis_url(service.settings), decode_responses=True)
    try:
        async with client.pubsub(ignore_subscribe_messages=True) as events:
            await events.subscribe(f"{service.ledger.prefix}events")
            last: dict[str, object] | None = None
            while True:
                record = await run_in_threadpool(service.ledger.get, request_id)
                state = await run_in_threadpool(_state, record, service)
                if state != last:
                    yield sse(record.state.value, state)
                    last = state
                if record.state in FINAL or await disconnected():
                    return
                if not await _next_event(events, request_id):
                    yield ": still here\n\n"
    finally:
        await client.aclose()


async def _next_event(events: redis.asyncio.client.PubSub, request_id: str) -> bool:
    """Wait for the next event of this request; False after a time of silence."""
    until = time.monotonic() + KEEPALIVE_S
    while (left := until - time.monotonic()) > 0:
        message = await events.get_message(timeout=left)
        if message is not None and request_id in str(message["data"]):
            return True
    return False
