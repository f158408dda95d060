"""What stops admission before it breaks something: rates, a full disk, a full Redis, a vector store that stands still."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modm_tasks.errors import UnavailableError
from modm_tasks.ledger import Ledger
from modm_tasks.redis_client import short
from modm_tasks.settings import Settings

#: Free space below which nothing is accepted: a few hundred images, and Redis must be able to rewrite its AOF.
MIN_FREE_MIB = 256
MAX_REDIS_SHARE = 0.95
FRESH_S = 2.0
#: Routing stands still when the request that has waited longest for it is the same one for so long.
STILL_S = 10.0


@dataclass(frozen=True)
class Bucket:
    """A token bucket: ``level`` tokens at ``at_s``."""

    level: float
    at_s: float


def take(bucket: Bucket | None, count: int, *, per_min: int, now_s: float) -> tuple[Bucket, float]:
    """Take ``count`` tokens of a bucket that holds one minute's worth: (bucket, seconds to wait; 0 = taken).

    A burst of a minute's worth passes at once, so short peaks are fine and the mean holds. More than a minute's worth at
    once passes only from a full bucket.
    """
    rate = per_min / 60.0
    level = float(per_min) if bucket is None else min(per_min, bucket.level + (now_s - bucket.at_s) * rate)
    need = min(count, per_min)
    if level + 1e-9 >= need:
        return Bucket(level - count, now_s), 0.0
    return Bucket(level, now_s), (need - level) / rate


class RateLimiter:
    """Buckets by client, in this process. Several orchestrators each allow the rate."""

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()

    def take(self, client: str, count: int, *, per_min: int, now_s: float) -> float:
        """Seconds to wait; 0 = may pass."""
        with self._lock:
            self._buckets[client], wait_s = take(self._buckets.get(client), count, per_min=per_min, now_s=now_s)
            if len(self._buckets) > 10_000:  # clients that have been quiet for long have full buckets anyway
                oldest = sorted(self._buckets, key=lambda c: self._buckets[c].at_s)[:5_000]
                for name in oldest:
                    del self._buckets[name]
            return wait_s


def disk_problem(folder: Path, min_free_mib: int = MIN_FREE_MIB) -> str | None:
    """Whether the file system of ``folder`` is nearly full."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free_mib = shutil.disk_usage(folder).free // 2**20
    if free_mib >= min_free_mib:
        return None
    return f"disk: {free_mib} MiB free at the image store; the floor is {min_free_mib} MiB"


def redis_problem(ledger: Ledger) -> str | None:
    """Whether Redis is away, or close to its maxmemory (then writes would fail half-way)."""
    try:
        memory = ledger.redis.info("memory")
        persistence = ledger.redis.info("persistence")
    except Exception as error:
        return f"Redis: {short(error)}"
    limit = int(memory.get("maxmemory") or 0)
    if limit and int(memory["used_memory"]) > MAX_REDIS_SHARE * limit:
        return f"Redis: {int(memory['used_memory']) // 2**20} MiB of {limit // 2**20} MiB maxmemory are used"
    if persistence.get("aof_enabled") == 1 and persistence.get("aof_last_write_status") == "err":
        return "Redis: its last write to the append-only file failed"
    return None


class RoutingWatch:
    """Whether accepted requests are routed. A slow or absent vector store, or embedder, shows as the same request in
    front for long; a burst that is worked off does not.
    """

    def __init__(self, *, still_s: float = STILL_S) -> None:
        self.still_s = still_s
        self._front: tuple[str, float] | None = None

    def problem(self, front: str | None, now_s: float) -> str | None:
        """``front``: the id that has waited longest, if any does. ``now_s`` is monotonic."""
        if front is None or self._front is None or self._front[0] != front:
            self._front = None if front is None else (front, now_s)
            return None
        still_s = now_s - self._front[1]
        if still_s < self.still_s:
            return None
        return f"routing: nothing was routed for {still_s:.0f} s; the vector store or the embedder is slow or away"


def unrouted(ledger: Ledger) -> str | None:
    """The accepted request that has waited longest for its route."""
    try:
        return next(iter(ledger.index("accepted", limit=1)), None)
    except UnavailableError:
        return None  # said by `redis_problem`


def health_problems(settings: Settings, ledger: Ledger) -> Callable[[], list[str]]:
    """A function that lists what stops admission; looks again every two seconds at most."""
    lock = threading.Lock()
    state: dict[str, object] = {"at": float("-inf"), "problems": []}
    root, routing = settings.image_root, RoutingWatch()

    def look() -> list[str]:
        with lock:
            if time.monotonic() - float(str(state["at"])) > FRESH_S:
                found = [redis_problem(ledger), routing.problem(unrouted(ledger), time.monotonic())]
                if "://" not in root:
                    found.append(disk_problem(Path(root)))
                state["problems"], state["at"] = [p for p in found if p], time.monotonic()
            return list(state["problems"])  # type: ignore[call-overload,no-any-return]

    return look
