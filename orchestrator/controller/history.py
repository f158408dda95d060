"""The last decisions of the controller, capped, so that every one can be explained."""

from __future__ import annotations

import json
from typing import Any

from modm_tasks.ledger import Ledger
from modm_tasks.redis_client import guarded
from orchestrator.controller import roles


@guarded
def remember(ledger: Ledger, tick: dict[str, Any], *, keep: int) -> None:
    """Append one tick: ``{at_s, why, allocation, inputs, decision, roles, ...}``; only the last ``keep`` stay."""
    key = f"{ledger.prefix}controller_ticks"
    pipe = ledger.redis.pipeline(transaction=True)
    pipe.rpush(key, json.dumps(tick))
    pipe.ltrim(key, -keep, -1)
    pipe.execute()


@guarded
def ticks(ledger: Ledger, *, last: int) -> list[dict[str, Any]]:
    """The last ticks, oldest first."""
    return [json.loads(text) for text in ledger.redis.lrange(f"{ledger.prefix}controller_ticks", -last, -1)]


@guarded
def leader(ledger: Ledger, what: str) -> str | None:
    """Who holds the lock now."""
    name = ledger.redis.get(f"{ledger.prefix}leader:{what}")
    return None if name is None else str(name)


def explain(ledger: Ledger, *, last: int) -> dict[str, Any]:
    """Who leads, totals since the ledger was made, and the last ticks, newest last."""
    return {
        "leader": leader(ledger, "controller"),
        "counts": roles.counts(ledger),
        "control": ledger.control().model_dump(),
        "ticks": ticks(ledger, last=last),
    }
