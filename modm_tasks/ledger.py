"""The request ledger: what was accepted, where it stands, who works on it.

A request is durable from the moment ``accept`` returns. Queue messages are mere tokens ("there is work in this queue"):
the ledger owns the order, and a worker that gets a token claims the *best ready request* of the queue. So a lost or
doubled message costs nothing but time, a request can change its queue while it waits, and order by deadline needs no
priorities in the broker (decision record 0005). A claim is a lease: whoever holds the attempt number publishes, and
only while the lease lives or nobody else took it.

Breaks where: Redis loses its disk (docs/reliability.md), or is a cluster (keys of one script live in many slots).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import redis

from modm_tasks import ledger_scripts, ledger_scripts_worker
from modm_tasks.errors import ConflictError, LeaseLostError, NotFoundError, RefusedError
from modm_tasks.ledger_arguments import accepted, accepting, routing, text_of
from modm_tasks.ledger_reads import LedgerReads, record_of
from modm_tasks.messages import Completion, Decision, RequestRecord, Route, State, SubmitRequest
from modm_tasks.redis_client import connect, guarded, pairs, redis_url
from modm_tasks.settings import Settings

_SCRIPTS = {
    name: text
    for module in (ledger_scripts, ledger_scripts_worker)
    for name, text in vars(module).items()
    if name.isupper() and name != "PRELUDE" and not name.startswith("_")
}


class Ledger(LedgerReads):
    """All moves of requests. Thread-safe; make one per process, after fork or spawn."""

    def __init__(self, client: redis.Redis, *, prefix: str = "modm:", max_attempts: int = 3) -> None:
        self.redis: Any = client
        self.prefix = prefix
        self.max_attempts = max_attempts
        self._scripts = {name: client.register_script(text) for name, text in _SCRIPTS.items()}

    @classmethod
    def from_settings(cls, settings: Settings) -> Ledger:
        return cls(
            connect(redis_url(settings)), prefix=settings.redis_prefix, max_attempts=settings.worker.max_attempts
        )

    def _run(self, name: str, *args: object) -> list[Any]:
        reply: list[Any] = self._scripts[name](keys=[self.prefix], args=[text_of(a) for a in args])
        return reply

    def _run_each(self, name: str, calls: Sequence[Sequence[object]]) -> list[list[Any]]:
        """A script with each of these arguments, in one round trip; not one transaction."""
        script, pipe = self._scripts[name], self.redis.pipeline(transaction=False)
        texts = [[text_of(a) for a in args] for args in calls]
        for args in texts:
            pipe.evalsha(script.sha, 1, self.prefix, *args)
        try:
            replies: list[list[Any]] = pipe.execute()
            return replies
        except redis.exceptions.NoScriptError:  # the first call of a Redis; asking each time would cost a round trip
            return [script(keys=[self.prefix], args=args) for args in texts]

    # --- by the front -------------------------------------------------------------------------------------------

    @guarded
    def accept(
        self,
        request_id: str,
        request: SubmitRequest,
        *,
        slo_s: float = 0.0,
        max_open: int = 1_000_000,
        max_client_open: int = 0,
        rank_offset_s: float = 0.0,
    ) -> tuple[str, bool]:
        """Make the request durable. Returns (id, whether it is new): an idempotency key seen before gives the first id.

        Raises RefusedError where too much is open already.
        """
        request_id, record = self.accept_record(
            request_id, request, slo_s=slo_s, max_open=max_open, max_client_open=max_client_open,
            rank_offset_s=rank_offset_s,
        )  # fmt: skip
        return request_id, record is not None

    @guarded
    def accept_record(
        self,
        request_id: str,
        request: SubmitRequest,
        *,
        slo_s: float = 0.0,
        max_open: int = 1_000_000,
        max_client_open: int = 0,
        rank_offset_s: float = 0.0,
    ) -> tuple[str, RequestRecord | None]:
        """``accept`` that gives a new request's record, which need not be read then; None where it is known already."""
        arguments = accepting(request_id, request, slo_s, max_open, max_client_open, rank_offset_s)
        return accepted(request_id, request, self._run("ACCEPT", *arguments), max_open, max_client_open)

    @guarded
    def accept_each(
        self, requests: Sequence[tuple[str, SubmitRequest, float]], *, max_open: int, max_client_open: int = 0
    ) -> list[tuple[str, RequestRecord | None] | RefusedError]:
        """``accept_record`` of several callers' requests, as (id, request, SLO seconds), in one round trip. Each is accepted
        or refused by itself.
        """
        calls = [accepting(i, r, slo_s, max_open, max_client_open, 0.0) for i, r, slo_s in requests]
        out: list[tuple[str, RequestRecord | None] | RefusedError] = []
        for (request_id, request, _), reply in zip(requests, self._run_each("ACCEPT", calls), strict=True):
            try:
                out.append(accepted(request_id, request, reply, max_open, max_client_open))
            except RefusedError as error:
                out.append(error)
        return out

    @guarded
    def route(
        self,
        request_id: str,
        decision: Decision,
        *,
        expected: State = State.ACCEPTED,
        text_vector: str = "",
        rank: float | None = None,
    ) -> bool:
        """Queue the request as decided. False where it has moved on (cancelled, claimed, routed by a twin)."""
        return bool(self._run("ROUTE", *routing(request_id, decision, expected, text_vector, rank))[0] == "ok")

    @guarded
    def route_many(self, moves: Sequence[tuple[str, Decision, str, float | None]]) -> list[bool]:
        """``route`` of several accepted requests, as (id, decision, text vector, rank), in one round trip.

        Each is a compare-and-set by itself, so an outage in between leaves some queued and some accepted.
        """
        calls = [routing(i, d, State.ACCEPTED, vector, rank) for i, d, vector, rank in moves]
        return [reply[0] == "ok" for reply in self._run_each("ROUTE", calls)]

    @guarded
    def wait_on(
        self, request_id: str, source_id: str, decision: Decision, *, until_s: float = 0.0, text_vector: str = ""
    ) -> Literal["ok", "ended", "conflict"]:
        """Hold the request until ``source_id`` ends. ``ended``: it has ended already, so decide again."""
        reply = self._run("WAIT", request_id, source_id, decision.model_dump_json(), until_s, text_vector)
        word = reply[0]
        return "ok" if word == "ok" else "ended" if word == "ended" else "conflict"

    @guarded
    def set_rank(self, request_id: str, rank: float) -> None:
        """A queued request moves in its queue. Nothing happens where it is queued no more."""
        queue = self.redis.hget(self._key(request_id), "queue")
        if queue and self.redis.zadd(f"{self.prefix}ready:{queue}", {request_id: rank}, xx=True, ch=True):
            self.redis.hset(self._key(request_id), "rank", format(rank, ".6f"))

    @guarded
    def finish_stored(self, request_id: str, completion: Completion, decision: Decision) -> bool:
        """Answer an exact repeat with the stored image. False where the request has moved on."""
        reply = self._run("FINISH_STORED", request_id, completion.model_dump_json(), decision.model_dump_json())
        return bool(reply[0] == "ok")

    @guarded
    def cancel(self, request_id: str) -> State:
        """Cancel: at once where no worker holds it, else at its next step (then RUNNING is returned).

        Raises NotFoundError, or ConflictError where it has ended.
        """
        return self._end(request_id, State.CANCELLED, "cancelled by the client")

    @guarded
    def end(self, request_id: str, state: State, error: str) -> State:
        """Report an unclaimed request failed or refused."""
        return self._end(request_id, state, error)

    def _end(self, request_id: str, state: State, error: str) -> State:
        word = self._run("END", request_id, state.value, error)[0]
        if word == "ok":
            return state
        if word in {"asked", "running"}:
            return State.RUNNING
        if word == "missing":
            raise NotFoundError(f"no request {request_id}")
        raise ConflictError(f"request {request_id} has ended: {word}")

    @guarded
    def admitted(self, request_id: str, clip_score: float | None) -> bool:
        """The finished image has been admitted to the cache (or is not to be). False where that was said before."""
        return bool(self._run("ADMITTED", request_id, "" if clip_score is None else clip_score)[0] == "ok")

    @guarded
    def expire(self, limit: int = 100) -> list[tuple[str, State, str]]:
        """Take expired claims back: (id, queued | failed | done by its fallback | cancelled, queue) of each."""
        return [(r[0], State(r[1]), r[2]) for r in self._run("EXPIRE", self.max_attempts, limit)]

    @guarded
    def retry(self, request_id: str) -> None:
        """A failed request starts again. Raises ConflictError where it has not failed."""
        if self._run("RETRY", request_id)[0] != "ok":
            raise ConflictError(f"request {request_id} has not failed, so it cannot be retried")

    @guarded
    def forget(self, request_id: str) -> str:
        """Drop one finished request from every index. Returns its image URI, or ''."""
        completion = self.redis.hget(self._key(request_id), "completion")
        pipe = self.redis.pipeline(transaction=True)
        pipe.delete(self._key(request_id), f"{self.prefix}waiters:{request_id}")
        for name in ("finished", "failed", "unadmitted"):
            pipe.zrem(f"{self.prefix}{name}", request_id)
        pipe.execute()
        return str(json.loads(completion)["uri"]) if completion else ""

    @guarded
    def trim(self, *, keep_s: float, keep: int, limit: int = 200) -> list[tuple[str, str]]:
        """Forget finished requests that are too old or too many: (id, image URI or '') of each."""
        gone = self._run("TRIM", keep_s, keep, limit)
        return [(r[0], json.loads(r[1])["uri"] if r[1] else "") for r in gone]

    # --- by a worker --------------------------------------------------------------------------------------------

    @guarded
    def claim(self, queue: str, worker: str, *, lease_s: float) -> RequestRecord | None:
        """The best ready request of ``queue``, now this worker's; None where nothing is ready."""
        reply = self._run("CLAIM", queue, worker, lease_s)
        return None if reply[0] == "empty" else record_of(pairs(reply[2]))

    def _owned(self, name: str, request_id: str, attempt: int, *args: object) -> list[Any]:
        reply = self._run(name, request_id, attempt, *args)
        if reply[0] == "lost":
            raise LeaseLostError(f"attempt {attempt} no longer holds request {request_id}")
        return reply

    @guarded
    def renew(
        self, request_id: str, attempt: int, lease_s: float, *, step: int | None = None
    ) -> Literal["ok", "cancelled"]:
        """Lengthen the lease, say how far it is. ``cancelled``: the user asked to stop. Raises LeaseLostError."""
        word = self._owned("RENEW", request_id, attempt, lease_s, "" if step is None else step)[0]
        return "cancelled" if word == "cancelled" else "ok"

    @guarded
    def finish(self, request_id: str, attempt: int, completion: Completion, *, device: str = "") -> None:
        """Publish the result, once. Raises LeaseLostError where another attempt owns the request.

        ``device``: name of the device that drew it, whose own seconds per step are learned from it.
        """
        bare = completion.model_copy(update={"vector": ""})
        self._owned(
            "FINISH", request_id, attempt, bare.model_dump_json(), completion.vector, completion.model,
            completion.steps_run, completion.gpu_s, device,
        )  # fmt: skip

    @guarded
    def fail(self, request_id: str, attempt: int, error: str, *, retry: bool) -> State:
        """Report an error: queued again while attempts are left and ``retry``, else failed, or done by its fallback image;
        cancelled if that was asked."""
        reply = self._owned("FAIL", request_id, attempt, error[:500], int(retry), self.max_attempts)
        return State(reply[0])

    @guarded
    def give_back(self, request_id: str, attempt: int) -> State:
        """Queue it again at its old rank, the attempt not counted; where its user has cancelled it, it ends."""
        return State(self._owned("GIVE_BACK", request_id, attempt)[0])

    @guarded
    def reroute_to_large(
        self,
        request_id: str,
        attempt: int,
        reason: str,
        *,
        fallback: Completion | None = None,
        was: Decision | None = None,
    ) -> State:
        """Queue a hit as a miss: its source is gone, or its refined image scored too low. That one is kept as ``fallback``
        and published where drawing it again fails for good.

        ``was``: the decision so far, whose similarities stay readable. Where its user has cancelled it meanwhile, it ends.
        """
        seen = {} if was is None else {n: getattr(was, n) for n in ("similarity", "predicted_similarity")}
        decision = Decision(route=Route.LARGE_GEN, policy="reroute", reason=reason, **seen)
        bare = "" if fallback is None else fallback.model_copy(update={"vector": ""}).model_dump_json()
        vector = "" if fallback is None else fallback.vector
        reply = self._owned(
            "REROUTE", request_id, attempt, decision.model_dump_json(), reason[:300], bare, vector
        )  # fmt: skip
        return State(reply[0])

    @guarded
    def finish_cancelled(self, request_id: str, attempt: int) -> None:
        self._owned("FINISH_CANCELLED", request_id, attempt)
