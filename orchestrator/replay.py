"""Replays a trace against a running system, open or closed loop, and gathers what became of every request."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modm_tasks.errors import ModmError, NotFoundError, RefusedError, UnavailableError
from modm_tasks.messages import FINAL, RequestRecord, State, SubmitRequest
from orchestrator.traces.rows import TraceRow

log = logging.getLogger(__name__)
#: Threads of an open loop: so many submits and so many waits at a time. A wait is a long poll of the oldest open requests.
PUMPS = 8
WAITERS = 16
#: Longest poll. It bounds what Ctrl-C leaves behind; with more open requests than waiters each has a shorter turn.
POLL_S = 5.0
SHORT_POLL_S = 1.0
WARM_UP_USERS = 8
#: How long an outage of the target may last before the replay ends with its error.
UNAVAILABLE_S = 60.0
#: A finished image is cached within so long, or it is not going to be.
ADMITTED_S = 60.0
SETTLE_S = 30.0


class Target(Protocol):
    """Where requests go; see `targets`."""

    def submit(self, request: SubmitRequest) -> RequestRecord: ...

    def wait(self, request_id: str, timeout_s: float, *, admitted: bool = False) -> RequestRecord: ...


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """How to replay. ``arrivals_s`` None = closed loop with ``concurrency`` users, each waiting for its image.

    ``give_up_s``: a request is lost when it has not ended and no other one has for so long. An absolute limit would call
    the tail of a long burst lost.
    """

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
    """What became of the requests: ``records`` in row order, refused ones left out.

    ``lost`` of them were accepted and never ended. After an interruption the records of requests that were still under
    way are there too, as last seen; they are neither done nor lost.
    """

    records: list[RequestRecord]
    refused: int = 0
    lost: int = 0
    interrupted: bool = False
    errors: list[str] = field(default_factory=list)


Listener = Callable[[Progress], None]


def replay(
    target: Target, rows: Sequence[TraceRow], plan: ReplayPlan, listener: Listener = lambda _: None
) -> ReplayResult:
    """Send every row and wait for its end. Ctrl-C stops submitting, cancels nothing, and returns what is known so far.

    Raises what a submit raises (InvalidInputError, UnauthorizedError), and UnavailableError once the target has not
    answered for UNAVAILABLE_S; a shorter outage is waited out. A refusal (429) is recorded, not repeated.
    """
    result = _Run(target, rows, plan, listener).run()
    if not result.interrupted:
        result.records = _settled(target, result.records)
    return result


def warm_up(
    target: Target, rows: Sequence[TraceRow], plan: ReplayPlan, listener: Listener = lambda _: None
) -> ReplayResult:
    """Requests that fill the cache: all to the large model, not counted, each waited for until it is cached."""
    fields = plan.fields | {"policy": "large-only", "warm_up": True, "features": ""}
    warming = ReplayPlan(concurrency=WARM_UP_USERS, fields=fields, give_up_s=plan.give_up_s)
    return _Run(target, rows, warming, listener, admitted=True).run()


class _Open:
    """A request that was accepted and has not ended, as far as is known."""

    __slots__ = ("done_since", "index", "record", "sent")

    def __init__(self, index: int, record: RequestRecord) -> None:
        self.index, self.record = index, record
        self.sent = time.monotonic()
        self.done_since: float | None = None


class _Run:
    """Threads of its own, daemons, because those of a pool would hold up Ctrl-C until their long polls end."""

    def __init__(
        self, target: Target, rows: Sequence[TraceRow], plan: ReplayPlan, listener: Listener, *, admitted: bool = False
    ) -> None:
        self.target, self.rows, self.plan, self.listener, self.admitted = target, rows, plan, listener, admitted
        self.progress = Progress(total=len(rows))
        self.result = ReplayResult(records=[])
        times = plan.arrivals_s
        # By intended time, with trace order among equals.
        self._order = list(range(len(rows))) if times is None else sorted(range(len(rows)), key=times.__getitem__)
        self._records: dict[int, RequestRecord] = {}
        self._open: deque[_Open] = deque()
        self._key = uuid.uuid4().hex
        self._next = self._ended = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._last_end = self._last_answer = time.monotonic()

    def run(self) -> ReplayResult:
        if self.plan.arrivals_s is None:
            jobs: list[Callable[[], None]] = [self._user] * min(self.plan.concurrency, max(1, len(self.rows)))
        else:
            started, wall = time.monotonic(), time.time()
            jobs = [lambda: self._pump(started, wall)] * PUMPS + [self._waiter] * WAITERS
        threads = [threading.Thread(target=self._guard, args=(job,), daemon=True, name="replay") for job in jobs]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except KeyboardInterrupt:
            self.result.interrupted = True
            self._stop.set()
        if self._error is not None:
            raise self._error
        with self._lock:
            self.result.records = [self._records[index] for index in sorted(self._records)]
        return self.result

    def _guard(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _take(self) -> int | None:
        with self._lock:
            if self._stop.is_set() or self._next >= len(self._order):
                return None
            self._next += 1
            return self._order[self._next - 1]

    def _user(self) -> None:
        """A user of the closed loop: sends the next row when the last has ended."""
        while (index := self._take()) is not None:
            opened = self._submit(index, None)
            while opened is not None and not self._stop.is_set() and not self._ended_now(opened, POLL_S):
                pass

    def _pump(self, started: float, wall: float) -> None:
        """Sends rows at their times. Several do so, that a slow submit does not delay the next arrival."""
        times = self.plan.arrivals_s or ()
        while (index := self._take()) is not None:
            delay = started + times[index] - time.monotonic()
            if delay > 0 and self._stop.wait(delay):
                return
            opened = self._submit(index, wall + times[index])
            if opened is not None:
                with self._lock:
                    self._open.append(opened)

    def _waiter(self) -> None:
        """Looks after open requests, oldest first, until every row has ended."""
        while not self._stop.is_set():
            with self._lock:
                opened = self._open.popleft() if self._open else None
                timeout_s = SHORT_POLL_S if len(self._open) > WAITERS else POLL_S
                if opened is None and self._ended == len(self.rows):
                    return
            if opened is None:
                self._stop.wait(0.05)
            elif not self._ended_now(opened, timeout_s):
                with self._lock:
                    self._open.append(opened)

    def _submit(self, index: int, arrival_s: float | None) -> _Open | None:
        """None where it was refused. The key makes a submit that is repeated after an outage the same request."""
        more = {"arrival_s": arrival_s, "idempotency_key": f"replay-{self._key}-{index}"} | self.plan.fields
        request = self.rows[index].request(**more)
        while True:
            try:
                record = self.target.submit(request)
            except RefusedError as error:
                with self._lock:
                    self.progress.refused += 1
                    self.result.refused += 1
                    self.result.errors.append(str(error))
                    self._ended += 1
                self.listener(self.progress)
                if arrival_s is None:
                    self._stop.wait(min(5.0, error.retry_after_s))  # a user in a closed loop pauses before asking again
                return None
            except UnavailableError as error:
                if not self._patient(error):
                    return None
                continue
            break
        opened = _Open(index, record)
        with self._lock:
            self._last_answer = time.monotonic()
            self._records[index] = record
            self.progress.submitted += 1
        self.listener(self.progress)
        return opened

    def _patient(self, error: UnavailableError) -> bool:
        """Pause in an outage; False once the run stops. Raises the error when the outage has lasted too long."""
        if time.monotonic() - self._last_answer > UNAVAILABLE_S:
            raise error
        return not self._stop.wait(0.5)

    def _ended_now(self, opened: _Open, timeout_s: float) -> bool:
        """One poll of a request; notes its end. True once nothing more is to be expected of it."""
        try:
            record = self.target.wait(opened.record.id, timeout_s, admitted=self.admitted)
        except NotFoundError:
            self._end(opened, lost=True)
            return True
        except UnavailableError as error:
            self._patient(error)
            return False
        now = time.monotonic()
        opened.record = record
        with self._lock:
            self._last_answer = now
            self._records[opened.index] = record
            alive = max(opened.sent, self._last_end)
        if record.state in FINAL:
            opened.done_since = opened.done_since or now
            if self.admitted and _unadmitted(record) and now - opened.done_since < ADMITTED_S:
                return False
            self._end(opened, lost=False)
            return True
        if now - alive > self.plan.give_up_s:
            self._end(opened, lost=True)
            return True
        return False

    def _end(self, opened: _Open, *, lost: bool) -> None:
        record = opened.record
        with self._lock:
            self._ended += 1
            self.progress.ended += 1
            self.result.lost += lost
            if not lost:
                self._last_end = time.monotonic()
            self.progress.done += record.state is State.DONE
            if record.decision is not None:
                self.progress.routed += 1
                self.progress.hits += record.decision.source_id is not None
        self.listener(self.progress)


def _settled(target: Target, records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The records once more, where they were read before the image was cached and its prompt score noted."""
    until = time.monotonic() + SETTLE_S
    settled = []
    for record in records:
        left_s = until - time.monotonic()
        if _unadmitted(record) and left_s > 0:
            try:
                record = target.wait(record.id, min(10.0, left_s), admitted=True)
            except ModmError as error:
                log.info("%s stays without its score: %s", record.id, error)
        settled.append(record)
    return settled


def _unadmitted(record: RequestRecord) -> bool:
    return record.state is State.DONE and record.admitted_s is None
