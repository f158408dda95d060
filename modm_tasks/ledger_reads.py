"""What the ledger can be asked. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from modm_tasks.cluster import ClusterState
from modm_tasks.errors import NotFoundError
from modm_tasks.messages import Completion, Decision, RequestRecord, Route, State, SubmitRequest
from modm_tasks.redis_client import guarded


def request_key(prefix: str, request_id: str) -> str:
    """The Redis hash of one request."""
    return f"{prefix}req:{request_id}"


def record_of(fields: dict[str, str]) -> RequestRecord:
    """A request from the fields of its hash."""

    def number(name: str) -> float | None:
        return float(fields[name]) if fields.get(name) else None

    return RequestRecord(
        id=fields["id"],
        state=State(fields["state"]),
        request=SubmitRequest.model_validate_json(fields["request"]),
        decision=Decision.model_validate_json(fields["decision"]) if fields.get("decision") else None,
        completion=Completion.model_validate_json(fields["completion"]) if fields.get("completion") else None,
        attempt=int(fields.get("attempt", 0)),
        worker=fields.get("worker"),
        error=fields.get("error"),
        rank=number("rank") or 0.0,
        arrival_s=number("arrival_s") or 0.0,
        accepted_s=number("accepted_s") or 0.0,
        queued_s=number("queued_s"),
        claimed_s=number("claimed_s"),
        done_s=number("done_s"),
        admitted_s=number("admitted_s"),
        step=int(fields.get("step", 0)),
        clip_score=number("clip_score"),
    )


class LedgerReads(ClusterState):
    """Mixed into the ledger."""

    def _key(self, request_id: str) -> str:
        return request_key(self.prefix, request_id)

    @guarded
    def get(self, request_id: str) -> RequestRecord:
        """Raises NotFoundError."""
        fields = self.redis.hgetall(self._key(request_id))
        if not fields:
            raise NotFoundError(f"no request {request_id}")
        return record_of(fields)

    @guarded
    def get_many(self, request_ids: Iterable[str]) -> list[RequestRecord]:
        """Those of the ids that exist, in order."""
        pipe = self.redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipe.hgetall(self._key(request_id))
        return [record_of(fields) for fields in pipe.execute() if fields]

    @guarded
    def field(self, request_id: str, name: str) -> str | None:
        """A private field of the record: ``tvec``, ``ivec`` (base64 vectors), ``log``, ``fallback``, ``waits_on``."""
        value = self.redis.hget(self._key(request_id), name)
        return None if value is None else str(value)

    @guarded
    def log(self, request_id: str) -> list[tuple[float, str, str]]:
        """Every transition: (Unix s, state, note)."""
        rows = []
        for line in (self.field(request_id, "log") or "").split("\n")[:-1]:
            at, state, note = [*line.split(" ", 2), "", ""][:3]
            rows.append((float(at), state, note.strip()))
        return rows

    @guarded
    def index(
        self, name: Literal["open", "accepted", "running", "waiting", "finished", "failed", "unadmitted"], *,
        oldest_s: float = float("-inf"), newest_s: float = float("inf"), limit: int = 1000, newest_first: bool = False,
    ) -> list[str]:  # fmt: skip
        """Ids of one index, by its time."""
        key = f"{self.prefix}{name}"
        if newest_first:
            ids = self.redis.zrevrangebyscore(key, newest_s, oldest_s, start=0, num=limit)
        else:
            ids = self.redis.zrangebyscore(key, oldest_s, newest_s, start=0, num=limit)
        return [str(i) for i in ids]

    @guarded
    def counts(self) -> dict[str, int]:
        """Size of every index, and of each ready set as ``ready:<queue>``."""
        names = ["open", "accepted", "running", "waiting", "failed", "unadmitted"]
        keys = names + [f"ready:{route.value}" for route in (Route.LARGE_GEN, Route.SMALL_REFINE)]
        pipe = self.redis.pipeline(transaction=False)
        for key in keys:
            pipe.zcard(f"{self.prefix}{key}")
        return dict(zip(keys, map(int, pipe.execute()), strict=True))

    @guarded
    def ready(self, queue: str, limit: int = 1000) -> list[tuple[str, float]]:
        """(id, rank) of what waits in ``queue``, first served first."""
        rows = self.redis.zrange(f"{self.prefix}ready:{queue}", 0, limit - 1, withscores=True)
        return [(str(i), float(rank)) for i, rank in rows]

    @guarded
    def list_length(self, queue: str) -> int:
        """Messages that wait in a Celery queue (one priority only, so one list)."""
        return int(self.redis.llen(queue))

    @guarded
    def position(self, request_id: str, queue: str) -> int | None:
        """How many requests of the same queue go first."""
        rank = self.redis.zrank(f"{self.prefix}ready:{queue}", request_id)
        return None if rank is None else int(rank)

    @guarded
    def waiters(self, source_id: str) -> list[str]:
        return sorted(self.redis.smembers(f"{self.prefix}waiters:{source_id}"))

    @guarded
    def in_use(self, request_ids: Sequence[str]) -> set[str]:
        """Those whose image an open request refines from: they may be evicted, but not deleted yet."""
        if not request_ids:
            return set()
        held = self.redis.hmget(f"{self.prefix}sources", list(request_ids))
        return {i for i, n in zip(request_ids, held, strict=True) if n is not None}

    @guarded
    def known(self, request_ids: Sequence[str]) -> set[str]:
        """Those of some ids that the ledger has a record of: their image files are still somebody's result."""
        pipe = self.redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipe.exists(self._key(request_id))
        return {i for i, there in zip(request_ids, pipe.execute(), strict=True) if there}

    @guarded
    def device_step_s(self) -> dict[tuple[str, str], float]:
        """``step_s`` of each (model, device name)."""
        rows: dict[str, str] = self.redis.hgetall(f"{self.prefix}device_step_s")
        found = ((name.partition("\t"), float(value)) for name, value in rows.items())
        return {(model, device): value for (model, _, device), value in found}

    @guarded
    def now_s(self) -> float:
        """The Redis clock, Unix seconds: the one clock of all records."""
        seconds, micros = self.redis.time()
        return int(seconds) + int(micros) / 1e6
