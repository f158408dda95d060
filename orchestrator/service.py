"""The front of the system: takes requests, answers questions about them. HTTP and `submit-trace --direct` use this one.

Accepting writes to the ledger and returns; embedding, search and routing follow on the pipeline's thread, so a burst is
accepted at the speed of Redis and embedded in batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modm_tasks import __version__
from modm_tasks.errors import ConflictError, InvalidInputError, ModmError, RefusedError
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import FINAL, RequestRecord, State, SubmitRequest, new_request_id
from modm_tasks.safety import load_hook
from modm_tasks.settings import Settings
from orchestrator.acceptor import Acceptor
from orchestrator.decisions.routing import check_features, check_policy
from orchestrator.explain import explain

if TYPE_CHECKING:
    from orchestrator.admission import Admission
    from orchestrator.pipeline import Pipeline
    from orchestrator.tokens import Tokens
    from orchestrator.watchdog import Watchdog
    from vector_store.cache import ImageCache
    from vector_store.embedder import Embedder


@dataclass(kw_only=True)
class Parts:
    """What a service is made of; ``build.build_service`` puts them together."""

    settings: Settings
    ledger: Ledger
    images: ImageStore
    cache: ImageCache
    embedder: Embedder
    tokens: Tokens
    pipeline: Pipeline
    admission: Admission
    watchdog: Watchdog


class Service:
    """Thread-safe. ``start`` begins routing and watching, ``stop`` ends both and releases the vector store."""

    def __init__(self, parts: Parts, *, health_problems: Callable[[], list[str]] = list) -> None:
        self.parts = parts
        self.settings, self.ledger = parts.settings, parts.ledger
        self._health_problems = health_problems
        self._hook = load_hook(parts.settings.safety_hook)
        #: Takes single requests; several callers' share one round trip.
        self.acceptor = Acceptor(self.submit_each)
        self._started = time.monotonic()
        self._slo_s = 0.0
        self._slo_read = float("-inf")
        self._lock = threading.Lock()

    def start(self) -> None:
        self.parts.cache.tidy()
        self.parts.tokens.warm_up()
        self.parts.pipeline.start()
        self.parts.admission.start()
        self.parts.watchdog.start()
        self.acceptor.start()

    def stop(self) -> None:
        self.acceptor.stop()
        self.parts.watchdog.stop()
        self.parts.admission.stop()
        self.parts.pipeline.stop()
        self.parts.cache.close()

    # --- taking requests ----------------------------------------------------------------------------------------

    def submit(self, request: SubmitRequest) -> RequestRecord:
        """Accept one request: durable when this returns. Raises InvalidInputError, RefusedError, UnavailableError."""
        return self.submit_many([request])[0]

    def submit_many(self, requests: Sequence[SubmitRequest]) -> list[RequestRecord]:
        """Accept several. Stops at the first that is refused; those before it stay accepted."""
        for request in requests:
            self._check(request)
        self._check_capacity()
        slo = self.settings.slo
        slo_s = slo.multiple * self.large_latency_s()
        records = []
        for request in requests:
            answer = self.ledger.accept_record(
                new_request_id(),
                request,
                slo_s=request.deadline_s or slo_s,
                max_open=slo.max_open_requests,
                max_client_open=self.settings.api.open_requests_per_client,
            )
            records.append(self._taken(*answer))
        return records

    def submit_each(self, requests: Sequence[SubmitRequest]) -> list[RequestRecord | ModmError]:
        """Accept requests of several callers in one round trip: for each its record, or what it is refused with."""
        out: list[RequestRecord | ModmError | None] = []
        for request in requests:
            try:
                self._check(request)
                out.append(None)
            except ModmError as error:
                out.append(error)
        try:
            self._check_capacity()
        except RefusedError as error:
            return [refusal or error for refusal in out]
        slo = self.settings.slo
        slo_s = slo.multiple * self.large_latency_s()
        good = [r for r, refusal in zip(requests, out, strict=True) if refusal is None]
        answers = iter(
            self.ledger.accept_each(
                [(new_request_id(), r, r.deadline_s or slo_s) for r in good],
                max_open=slo.max_open_requests,
                max_client_open=self.settings.api.open_requests_per_client,
            )
        )
        return [refusal or self._answered(next(answers)) for refusal in out]

    def _answered(self, answer: tuple[str, RequestRecord | None] | RefusedError) -> RequestRecord | ModmError:
        if isinstance(answer, RefusedError):
            return answer
        try:
            return self._taken(*answer)
        except ModmError as error:  # one that is known but cannot be read: the others of its batch are accepted
            return error

    def _taken(self, request_id: str, record: RequestRecord | None) -> RequestRecord:
        """A new request goes on to be routed; one that its idempotency key makes known is read."""
        if record is None:
            return self.ledger.get(request_id)
        self.parts.pipeline.put(request_id, record)
        return record

    @property
    def slow_to_check(self) -> bool:
        """Whether somebody else's code looks at prompts: it must not hold up other callers."""
        return self._hook is not None

    def _check(self, request: SubmitRequest) -> None:
        if request.policy is not None:
            check_policy(request.policy)
        if request.features is not None:
            check_features(request.features)
        if self._hook is not None and (reason := self._hook(request.prompt, None)) is not None:
            raise InvalidInputError(f"prompt: {reason}", field="prompt")
        limit = self.settings.num_inference_steps * 4
        if request.num_inference_steps is not None and request.num_inference_steps > limit:
            raise InvalidInputError(f"num_inference_steps must be at most {limit}", field="num_inference_steps")

    def _check_capacity(self) -> None:
        if problems := self._health_problems():
            raise RefusedError(f"not accepting work: {problems[0]}", retry_after_s=10)
        control = self.ledger.recent_control()
        if control.refuse_until_s and (wait := control.refuse_until_s - self.ledger.now_s()) > 0:
            raise RefusedError("overloaded: no quality is left to give up", retry_after_s=round(wait, 1))
        bound = self.settings.slo.max_backlog_s
        if bound > 0 and (backlog := self.backlog_s()) > bound:
            raise RefusedError(
                f"{backlog:.0f} s of work are queued; the limit is {bound:.0f} s",
                retry_after_s=round(backlog - bound, 1),
            )

    def backlog_s(self) -> float:
        """Predicted seconds until a request that is queued now starts: queued work over the workers that are ready."""
        counts, steps = self.ledger.counts(), self.ledger.step_s()
        total = self.settings.num_inference_steps
        large = steps.get(self.settings.large_model, 0.0) * total
        small = steps.get(self.settings.small_model, 0.0) * total
        work = counts["ready:large-gen"] * large + counts["ready:small-refine"] * small * 0.7
        return work / max(1, len(self.ledger.workers()))

    def large_latency_s(self) -> float:
        """Seconds of one large image: set, or learned from completions; 0 while unknown."""
        if self.settings.slo.large_latency_s:
            return self.settings.slo.large_latency_s
        with self._lock:
            if time.monotonic() - self._slo_read > 2.0:
                per_step = self.ledger.step_s().get(self.settings.large_model, 0.0)
                self._slo_s = per_step * self.settings.num_inference_steps
                self._slo_read = time.monotonic()
            return self._slo_s

    # --- answering questions ------------------------------------------------------------------------------------

    def get(self, request_id: str) -> RequestRecord:
        return self.ledger.get(request_id)

    def wait(self, request_id: str, timeout_s: float, *, admitted: bool = False) -> RequestRecord:
        """The record once it is final (and, if asked, admitted to the cache), or as it stands after ``timeout_s``."""
        until = time.monotonic() + timeout_s
        with self.ledger.redis.pubsub(ignore_subscribe_messages=True) as events:
            events.subscribe(f"{self.ledger.prefix}events")
            while True:
                record = self.ledger.get(request_id)
                left = until - time.monotonic()
                if left <= 0 or (record.state in FINAL and not (admitted and _unadmitted(record))):
                    return record
                self._next_event(events, request_id, min(left, 2.0))

    @staticmethod
    def _next_event(events: Any, request_id: str, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            message = events.get_message(timeout=left)
            if message is not None and request_id in str(message["data"]):
                return

    def image_uri(self, request_id: str) -> str:
        """Where the result lies. Raises ConflictError while there is none."""
        record = self.ledger.get(request_id)
        if record.completion is None:
            reason = f": {record.error}" if record.error else ""
            raise ConflictError(f"request {request_id} has no image; it is {record.state.value}{reason}")
        return record.completion.uri

    def cancel(self, request_id: str) -> RequestRecord:
        """Cancel at once, or at the next step where a worker draws it."""
        self.ledger.cancel(request_id)
        self.parts.pipeline.forget(request_id)
        self.parts.admission.wake_waiters(request_id)
        return self.ledger.get(request_id)

    def retry(self, request_id: str) -> RequestRecord:
        """An operator's retry of a failed request."""
        self.ledger.get(request_id)
        self.ledger.retry(request_id)
        self.parts.pipeline.put(request_id)
        return self.ledger.get(request_id)

    def list(self, *, state: State | None, client: str | None, limit: int) -> list[RequestRecord]:
        """Newest first."""
        ids: list[str] = []
        if state is None or state not in FINAL:
            ids += self.ledger.index("open", limit=limit * 5, newest_first=True)
        if state is None or state in FINAL:
            ids += self.ledger.index(
                "failed" if state is State.FAILED else "finished", limit=limit * 5, newest_first=True
            )
        records = [
            r
            for r in self.ledger.get_many(dict.fromkeys(ids))
            if (state is None or r.state is state) and (client is None or r.request.client == client)
        ]
        return records[:limit]

    def explain(self, request_id: str) -> dict[str, Any]:
        """Everything that is known of a decision, in words and numbers."""
        return explain(self.ledger, request_id)

    def purge_request(self, request_id: str) -> None:
        """Forget a finished request. Raises ConflictError where it is still open."""
        record = self.ledger.get(request_id)
        if record.state not in FINAL:
            raise ConflictError(f"request {request_id} is {record.state.value}; cancel it first")
        uri = self.ledger.forget(request_id)
        if uri and self.parts.cache.get(request_id, namespace=record.request.namespace) is None:
            self.parts.images.delete(uri)

    def forget_finished(self, request_ids: Sequence[str]) -> None:
        """Drop the records of purged images, so that their prompts are gone too. Open requests stay."""
        for record in self.ledger.get_many(request_ids):
            if record.state in FINAL:
                self.ledger.forget(record.id)

    # --- health -------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Problems by name; ready means that a submit would be accepted and some worker would draw it."""
        problems: list[str] = []
        try:
            self.ledger.redis.ping()
            workers = self.ledger.workers()
        except Exception as error:
            return {"ready": False, "problems": [f"Redis: {str(error)[:200]}"], "workers": 0}
        problems += self._health_problems()
        for name, thread in (("pipeline", self.parts.pipeline), ("watchdog", self.parts.watchdog)):
            if not thread.alive():
                problems.append(f"{name} has stopped")
        if self.parts.pipeline.last_error:
            problems.append(self.parts.pipeline.last_error)
        return {"ready": not problems, "problems": problems, "workers": len(workers)}

    def status(self) -> dict[str, Any]:
        """The live view: counts, workers with roles, the window's figures, cache, health."""
        ledger, control = self.ledger, self.ledger.control()
        bucket_s = control.bucket_s or self.settings.controller.bucket_s
        now = ledger.now_s()
        window = ledger.window(window_s=self.settings.controller.window_s, bucket_s=bucket_s, now_s=now)
        roles = ledger.desired_roles()
        routed = window.get("hits", 0) + window.get("misses", 0)
        total = window.get("slo_total", 0)
        return {
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "counts": ledger.counts(),
            "workers": [
                w.model_dump(mode="json") | {"role": roles[w.worker].role if w.worker in roles else w.role}
                for w in ledger.workers()
            ],
            "window": window,
            "window_s": self.settings.controller.window_s,
            "hit_rate": window.get("hits", 0) / routed if routed else None,
            "slo": {
                "large_latency_s": self.large_latency_s(),
                "multiple": self.settings.slo.multiple,
                "met": 1 - window.get("slo_missed", 0) / total if total else None,
            },
            "backlog_s": round(self.backlog_s(), 3),
            "cache": {n: self.parts.cache.count(n) for n in self.parts.cache.namespaces()},
            "control": control.model_dump(),
            "mode": control.mode or self.settings.worker.mode,
            "policy": self.settings.routing.policy,
            "models": {"large": self.settings.large_model, "small": self.settings.small_model},
            "health": self.health(),
        }


def _unadmitted(record: RequestRecord) -> bool:
    return record.state is State.DONE and record.admitted_s is None
