"""Replays a trace against a running system, open or closed loop, and gathers what became of every request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol

from modm_tasks.errors import ModmError, RefusedError
from modm_tasks.messages import FINAL, RequestRecord, State, SubmitRequest
from orchestrator.traces.rows import TraceRow

#: Threads that hold submits and waits of an open loop. A wait is a long poll, so this bounds connections, not requests.
POOL = 32


class Target(Protocol):
    """Where requests go; see `targets`."""

    def submit(self, request: SubmitRequest) -> RequestRecord: ...

    def wait(self, request_id: str, timeout_s: float, *, admitted: bool = False) -> RequestRecord: ...


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """How to replay. ``arrivals_s`` None = closed loop with ``concurrency`` users, each waiting for its image."""

    arrivals_s: Sequence[float] | None = None
    concurrency: int = 1
    fields: dict[str, Any] = field(default_factory=dict)
    give_up_s: float = 1800.0


@dataclass(kw_only=True)
class Progress:
    """Live counts. ``served_per_min`` since the first submit."""

    total: int
    submitted: int = 0
    done: int = 0
    ended: int = 0
    hits: int = 0
    routed: int = 0
    refused: int = 0
    started_s: float = field(default_factory=time.monotonic)

    @property
    def served_per_min(self) -> float:
        elapsed = time.monotonic() - self.started_s
        return 60 * self.done / elapsed if elapsed > 0 else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.routed if self.routed else 0.0


@dataclass(kw_only=True)
class ReplayResult:
    """What became of the requests. ``lost`` were accepted and never ended within the time allowed."""

    records: list[RequestRecord]
    refused: int = 0
    lost: int = 0
    interrupted: bool = False
    errors: list[str] = field(default_factory=list)


Listener = Callable[[Progress], None]


def replay(
    target: Target, rows: Sequence[TraceRow], plan: ReplayPlan, listener: Listener = lambda _: None
) -> ReplayResult:
    """Send every row and wait for its end. Ctrl-C stops submitting and returns what is known so far."""
    run = _Run(target, rows, plan, listener)
    result = run.closed() if plan.arrivals_s is None else run.open(plan.arrivals_s)
    if not result.interrupted:
        result.records = [_settled(target, record) for record in result.records]
    return result


def warm_up(
    target: Target, rows: Sequence[TraceRow], plan: ReplayPlan, listener: Listener = lambda _: None
) -> ReplayResult:
    """Requests that fill the cache: all to the large model, not counted, each waited for until it is cached."""
    fields = plan.fields | {"policy": "large-only", "warm_up": True, "features": ""}
    run = _Run(target, rows, ReplayPlan(concurrency=8, fields=fields, give_up_s=plan.give_up_s), listener, admitted=True)
    return run.closed()


class _Run:
    def __init__(
        self, target: Target, rows: Sequence[TraceRow], plan: ReplayPlan, listener: Listener, *, admitted: bool = False
    ) -> None:
        self.target, self.rows, self.plan, self.listener, self.admitted = target, rows, plan, listener, admitted
        self.progress = Progress(total=len(rows))
        self.result = ReplayResult(records=[])
        self._next = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def closed(self) -> ReplayResult:
        """``concurrency`` users, each sending the next row when its last has ended."""
        with ThreadPoolExecutor(max_workers=self.plan.concurrency) as pool:
            self._gather([pool.submit(self._user) for _ in range(self.plan.concurrency)])
        return self.result

    def _user(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                index = self._next
                self._next += 1
            if index >= len(self.rows):
                return
            record = self._submit(self.rows[index], None)
            if record is not None:
                self._finish(record.id)

    def open(self, arrivals_s: Sequence[float]) -> ReplayResult:
        """Each row at its intended time, whatever the system does; latency counts from that time."""
        started, wall = time.monotonic(), time.time()
        with ThreadPoolExecutor(max_workers=POOL) as pool:
            futures = [pool.submit(self._pump, started, wall, arrivals_s) for _ in range(min(4, len(self.rows)))]
            self._gather(futures)
            if not self._stop.is_set():
                ids = [r.id for r in self.result.records]
                self.result.records = []
                self._gather([pool.submit(self._finish, request_id) for request_id in ids])
        return self.result

    def _pump(self, started: float, wall: float, arrivals_s: Sequence[float]) -> None:
        """Submitting threads take turns; several, so that a slow submit does not delay the next arrival."""
        while not self._stop.is_set():
            with self._lock:
                index = self._next
                self._next += 1
            if index >= len(self.rows):
                return
            delay = started + arrivals_s[index] - time.monotonic()
            if delay > 0 and self._stop.wait(delay):
                return
            record = self._submit(self.rows[index], wall + arrivals_s[index])
            if record is not None:
                with self._lock:
                    self.result.records.append(record)

    def _gather(self, futures: Sequence[Any]) -> None:
        try:
            for future in as_completed(futures):
                future.result()
        except KeyboardInterrupt:
            self.result.interrupted = True
            self._stop.set()
        except BaseException:
            self._stop.set()
            raise

    def _submit(self, row: TraceRow, arrival_s: float | None) -> RequestRecord | None:
        request = row.request(arrival_s=arrival_s, **self.plan.fields)
        try:
            record = self.target.submit(request)
        except RefusedError as error:
            with self._lock:
                self.progress.refused += 1
                self.result.refused += 1
                self.result.errors.append(str(error))
            self.listener(self.progress)
            if arrival_s is None:
                self._stop.wait(min(5.0, error.retry_after_s))  # a user in a closed loop pauses before asking again
            return None
        with self._lock:
            self.progress.submitted += 1
        self.listener(self.progress)
        return record

    def _finish(self, request_id: str) -> None:
        until = time.monotonic() + self.plan.give_up_s
        record: RequestRecord | None = None
        while not self._stop.is_set():
            try:
                record = self.target.wait(request_id, min(30.0, max(0.1, until - time.monotonic())), admitted=self.admitted)
            except ModmError as error:
                if not error.retryable or time.monotonic() > until:
                    raise
                self._stop.wait(0.5)
                continue
            ended = record.state in FINAL and not (self.admitted and _unadmitted(record))
            if ended or time.monotonic() > until:
                break
        if record is None:
            return
        with self._lock:
            self.result.records.append(record)
            if record.state not in FINAL and not self._stop.is_set():
                self.result.lost += 1
            self.progress.ended += 1
            self.progress.done += record.state is State.DONE
            if record.decision is not None:
                self.progress.routed += 1
                self.progress.hits += record.decision.source_id is not None
        self.listener(self.progress)


def _settled(target: Target, record: RequestRecord) -> RequestRecord:
    """The record once more, where it was read before its image was cached and its prompt score noted."""
    return target.wait(record.id, 10.0, admitted=True) if _unadmitted(record) else record


def _unadmitted(record: RequestRecord) -> bool:
    return record.state is State.DONE and record.admitted_s is None
