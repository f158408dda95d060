"""What the processes know of each other, in Redis: ready workers, desired roles, runtime control, the load windows.

All of it is state, not commands: whoever restarts reads it again and continues.
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modm_tasks.errors import InvalidInputError
from modm_tasks.messages import WorkerStatus
from modm_tasks.queues import Mode, Role
from modm_tasks.redis_client import guarded


class DesiredRole(BaseModel):
    """What a worker should be. ``drained`` workers consume no role queue."""

    model_config = ConfigDict(frozen=True)
    role: Role
    epoch: int = 0
    pinned: bool = Field(False, description="Assigned by an operator; the controller leaves it alone.")
    drained: bool = False


class Control(BaseModel):
    """What may be changed while the system runs; None = as in the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    mode: Mode | None = None
    allocation: str | None = None
    static_large: int | None = Field(None, ge=0)
    period_s: float | None = Field(None, gt=0)
    bucket_s: float | None = Field(None, ge=0.01, le=3600)
    degradation: int = Field(0, ge=0, description="Steps of quality given up under overload.")
    refuse_until_s: float = Field(0.0, description="Unix seconds until which new work is refused.")
    cache_admission: Literal["all", "large-only"] | None = None
    verify_floor: float | None = Field(None, description="CLIP score instead of the ladder's floors, for all rungs.")
    escalation_rate: float | None = Field(None, ge=0, le=1)


#: A change of the control is in force everywhere after so long.
CONTROL_FRESH_S = 0.5


class RoleMove(BaseModel):
    """A worker changed its role."""

    model_config = ConfigDict(frozen=True)
    at_s: float
    worker: str
    old: str | None
    new: str | None
    epoch: int
    reason: str = ""


class ClusterState:
    """Mixed into the ledger: the same Redis, the same clock."""

    redis: Any  # redis.Redis; its stubs cannot tell a sync reply from an awaitable one
    prefix: str
    _control_seen: tuple[float, Control] = (float("-inf"), Control())

    # --- workers ------------------------------------------------------------------------------------------------

    @guarded
    def worker_ready(self, status: WorkerStatus, ttl_s: int) -> None:
        """Said by the GPU child, again and again; when it stops saying so the worker is no longer ready."""
        self.redis.set(f"{self.prefix}worker:{status.worker}", status.model_dump_json(), ex=ttl_s)
        self.redis.sadd(f"{self.prefix}workers", status.worker)

    @guarded
    def worker_gone(self, worker: str) -> None:
        self.redis.delete(f"{self.prefix}worker:{worker}")

    @guarded
    def workers(self) -> list[WorkerStatus]:
        """The ready ones, by name."""
        names = sorted(str(n) for n in self.redis.smembers(f"{self.prefix}workers"))
        if not names:
            return []
        found = self.redis.mget([f"{self.prefix}worker:{n}" for n in names])
        return [WorkerStatus.model_validate_json(text) for text in found if text]

    # --- roles --------------------------------------------------------------------------------------------------

    @guarded
    def desired_roles(self) -> dict[str, DesiredRole]:
        rows: dict[str, str] = self.redis.hgetall(f"{self.prefix}roles")
        return {name: DesiredRole.model_validate_json(text) for name, text in rows.items()}

    def desired_role(self, worker: str) -> Role | None:
        role = self.desired_roles().get(worker)
        return role.role if role else None

    @guarded
    def set_desired_role(self, worker: str, role: DesiredRole) -> None:
        self.redis.hset(f"{self.prefix}roles", worker, role.model_dump_json())

    @guarded
    def forget_worker(self, worker: str) -> None:
        self.redis.hdel(f"{self.prefix}roles", worker)
        self.redis.srem(f"{self.prefix}workers", worker)

    @guarded
    def next_epoch(self) -> int:
        return int(self.redis.incr(f"{self.prefix}epoch"))

    @guarded
    def record_move(self, move: RoleMove) -> None:
        key = f"{self.prefix}role_moves"
        self.redis.rpush(key, move.model_dump_json())
        self.redis.ltrim(key, -10_000, -1)

    @guarded
    def role_moves(self, *, since_s: float = 0.0) -> list[RoleMove]:
        rows = self.redis.lrange(f"{self.prefix}role_moves", 0, -1)
        moves = [RoleMove.model_validate_json(text) for text in rows]
        return [m for m in moves if m.at_s >= since_s]

    # --- control ------------------------------------------------------------------------------------------------

    @guarded
    def control(self) -> Control:
        rows: dict[str, str] = self.redis.hgetall(f"{self.prefix}control")
        return Control.model_validate({k: json.loads(v) for k, v in rows.items()})

    def recent_control(self) -> Control:
        """``control``, read again after CONTROL_FRESH_S: for what asks at every request."""
        at_s, seen = self._control_seen
        if time.monotonic() - at_s >= CONTROL_FRESH_S:
            seen = self.control()
            self._control_seen = (time.monotonic(), seen)
        return seen

    @guarded
    def set_control(self, **changes: Any) -> Control:
        """Change some fields; None returns a field to the settings. Raises InvalidInputError."""
        try:
            merged = Control.model_validate(self.control().model_dump() | changes)
        except ValueError as error:
            raise InvalidInputError(f"control: {str(error).splitlines()[-2].strip()}", field="control") from error
        key = f"{self.prefix}control"
        values = {k: json.dumps(v) for k, v in merged.model_dump().items() if v is not None}
        gone = [k for k, v in merged.model_dump().items() if v is None]
        pipe = self.redis.pipeline(transaction=True)
        if gone:
            pipe.hdel(key, *gone)
        pipe.hset(key, mapping=values)
        pipe.execute()
        self._control_seen = (float("-inf"), merged)
        return merged

    # --- windows ------------------------------------------------------------------------------------------------

    @guarded
    def window(self, *, window_s: float, bucket_s: float, now_s: float) -> dict[str, float]:
        """Sums over the last ``window_s``: arrivals, hits, misses, k:<k>, done, failed, refused, latency_sum,
        slo_total, slo_missed, model:<name>:{n,steps,gpu_s}, clip_sum, clip_n, retries, rerouted, escalated, waited, stored.
        """
        total: dict[str, float] = {}
        for row in self.series(window_s=window_s, bucket_s=bucket_s, now_s=now_s):
            for field, value in row.items():
                if field != "at_s":
                    total[field] = total.get(field, 0.0) + value
        return total

    @guarded
    def series(self, *, window_s: float, bucket_s: float, now_s: float) -> list[dict[str, float]]:
        """The same, bucket by bucket, oldest first, each with its start ``at_s``."""
        last = int(now_s // bucket_s)
        first = last - int(window_s // bucket_s) + 1
        pipe = self.redis.pipeline(transaction=False)
        for bucket in range(first, last + 1):
            pipe.hgetall(f"{self.prefix}win:{bucket}")
        rows = pipe.execute()
        return [{"at_s": (first + i) * bucket_s} | {k: float(v) for k, v in row.items()} for i, row in enumerate(rows)]

    @guarded
    def step_s(self) -> dict[str, float]:
        """Seconds per step of each model, learned from completions (a moving average)."""
        rows: dict[str, str] = self.redis.hgetall(f"{self.prefix}step_s")
        return {name: float(value) for name, value in rows.items()}

    # --- leadership ---------------------------------------------------------------------------------------------

    @guarded
    def lead(self, what: str, me: str, ttl_s: float) -> bool:
        """Take or keep a lock with a time to live. True while ``me`` holds it."""
        script = (
            "if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end "
            "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return 1 end "
            "return 0"
        )
        return bool(self.redis.eval(script, 1, f"{self.prefix}leader:{what}", me, str(int(ttl_s * 1000))))

    @guarded
    def stop_leading(self, what: str, me: str) -> None:
        script = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 0"
        self.redis.eval(script, 1, f"{self.prefix}leader:{what}", me)

    @guarded
    def document(self, name: str, value: Any | None = None) -> Any | None:
        """Read (or write) a small JSON document, e.g. the controller's state or its last decisions."""
        key = f"{self.prefix}doc:{name}"
        if value is not None:
            self.redis.set(key, json.dumps(value))
            return value
        text = self.redis.get(key)
        return None if text is None else json.loads(str(text))
