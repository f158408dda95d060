"""Who decided which role, when and why; and what was last seen in force. Beside the ledger's desired roles."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from modm_tasks.cluster import DesiredRole, RoleMove
from modm_tasks.errors import ConflictError, NotFoundError
from modm_tasks.ledger import Ledger
from modm_tasks.queues import Mode, Role
from modm_tasks.redis_client import guarded


class Decided(BaseModel):
    """When and why the desired role of an epoch was written. Redis clock."""

    model_config = ConfigDict(frozen=True)
    epoch: int
    at_s: float
    reason: str = ""


class Applied(BaseModel):
    """The last state of a worker that was verified by ``active_queues``. ``role`` None = drained."""

    model_config = ConfigDict(frozen=True)
    role: Role | None
    mode: Mode
    epoch: int
    at_s: float = 0.0


#: Compare and set, so that the controller never undoes what an operator said in the meantime.
_WRITE = """
local epoch = cjson.decode(redis.call('HGET', KEYS[1], ARGV[1]) or '{"epoch":0}')['epoch']
if ARGV[2] ~= '' and tonumber(ARGV[2]) ~= epoch then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
return 1
"""


@guarded
def decide(
    ledger: Ledger,
    worker: str,
    role: Role,
    *,
    reason: str,
    pinned: bool = False,
    drained: bool = False,
    seen_epoch: int | None = None,
) -> DesiredRole | None:
    """Write a desired role under a new epoch. The reconciler puts it into force and records the move.

    ``seen_epoch``: write only if the role still has the epoch that the caller saw (0 = none yet); else None is returned.
    """
    wanted = DesiredRole(role=role, epoch=ledger.next_epoch(), pinned=pinned, drained=drained)
    decided = Decided(epoch=wanted.epoch, at_s=ledger.now_s(), reason=reason)
    written = ledger.redis.eval(
        _WRITE, 2, f"{ledger.prefix}roles", f"{ledger.prefix}role_decided",
        worker, "" if seen_epoch is None else seen_epoch, wanted.model_dump_json(), decided.model_dump_json(),
    )  # fmt: skip
    return wanted if written else None


@guarded
def decided(ledger: Ledger) -> dict[str, Decided]:
    rows: dict[str, str] = ledger.redis.hgetall(f"{ledger.prefix}role_decided")
    return {name: Decided.model_validate_json(text) for name, text in rows.items()}


@guarded
def applied(ledger: Ledger) -> dict[str, Applied]:
    rows: dict[str, str] = ledger.redis.hgetall(f"{ledger.prefix}role_applied")
    return {name: Applied.model_validate_json(text) for name, text in rows.items()}


@guarded
def set_applied(ledger: Ledger, worker: str, state: Applied) -> None:
    ledger.redis.hset(f"{ledger.prefix}role_applied", worker, state.model_dump_json())


@guarded
def forget(ledger: Ledger, worker: str) -> None:
    """Drop everything that is kept of a worker, but for its moves."""
    ledger.forget_worker(worker)
    for name in ("role_decided", "role_applied"):
        ledger.redis.hdel(f"{ledger.prefix}{name}", worker)


@guarded
def note_time(ledger: Ledger, move: RoleMove, *, took_s: float) -> None:
    """How long a move took from the decision until ``active_queues`` agreed."""
    key = f"{ledger.prefix}role_times"
    ledger.redis.rpush(key, json.dumps({"worker": move.worker, "epoch": move.epoch, "took_s": round(took_s, 4)}))
    ledger.redis.ltrim(key, -10_000, -1)


@guarded
def timed_moves(ledger: Ledger, *, since_s: float = 0.0) -> list[dict[str, Any]]:
    """The moves since then, each with ``took_s`` (None where the decision is not on record)."""
    rows = [json.loads(text) for text in ledger.redis.lrange(f"{ledger.prefix}role_times", 0, -1)]
    took = {(row["worker"], row["epoch"]): row["took_s"] for row in rows}
    moves = ledger.role_moves(since_s=since_s)
    return [m.model_dump() | {"took_s": took.get((m.worker, m.epoch))} for m in moves]


@guarded
def count(ledger: Ledger, what: str, by: int = 1) -> None:
    """Totals since the ledger was made: ``decisions``, ``moves``, ``repairs``."""
    ledger.redis.hincrby(f"{ledger.prefix}controller_counts", what, by)


@guarded
def counts(ledger: Ledger) -> dict[str, int]:
    rows: dict[str, str] = ledger.redis.hgetall(f"{ledger.prefix}controller_counts")
    return {name: int(value) for name, value in rows.items()}


# --- what an operator may do --------------------------------------------------------------------------------------


def assign(ledger: Ledger, worker: str, role: Role | Literal["auto"]) -> DesiredRole:
    """Pin a worker to a role, or give it back to the controller (``auto``). Raises NotFoundError."""
    if role == "auto":
        return _change(ledger, worker, {"pinned": False}, "given back to the controller")
    return _change(ledger, worker, {"role": role, "pinned": True}, "assigned by an operator")


def drain(ledger: Ledger, worker: str) -> DesiredRole:
    """Let a worker finish what it does and take nothing more. Raises NotFoundError, ConflictError: drained already."""
    if known(ledger, worker).drained:
        raise ConflictError(f"worker {worker} is drained already")
    return _change(ledger, worker, {"drained": True}, "drained by an operator")


def resume(ledger: Ledger, worker: str) -> DesiredRole:
    """Undo ``drain``. Raises NotFoundError, ConflictError: not drained."""
    if not known(ledger, worker).drained:
        raise ConflictError(f"worker {worker} is not drained")
    return _change(ledger, worker, {"drained": False}, "resumed by an operator")


def _change(ledger: Ledger, worker: str, changes: dict[str, Any], reason: str) -> DesiredRole:
    for _ in range(5):  # the controller may write between our reading and our writing
        now = known(ledger, worker)
        new = now.model_copy(update=changes)
        written = decide(
            ledger, worker, new.role, pinned=new.pinned, drained=new.drained, reason=reason, seen_epoch=now.epoch
        )
        if written is not None:
            return written
    raise ConflictError(f"the role of {worker} changes all the time; try again")


def known(ledger: Ledger, worker: str) -> DesiredRole:
    """The desired role of a worker that has one, or that is ready and about to get one. Raises NotFoundError."""
    roles = ledger.desired_roles()
    if worker in roles:
        return roles[worker]
    ready = [status.worker for status in ledger.workers()]
    if worker in ready:
        return DesiredRole(role="small")
    names = ", ".join(sorted({*roles, *ready})) or "none"
    raise NotFoundError(f"no worker {worker}; known: {names}", field="worker")
