"""From done to cached: the finished image enters the cache, its prompt score is noted, whoever waited on it goes on.

Completions come by a kombu queue; each is only a word that says which request, because what was finished stands in the
ledger. A completion that is lost is found by the watchdog, one that comes twice is known by then.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from celery import Celery
from kombu.messaging import Consumer

from modm_tasks.errors import ModmError, NotFoundError, UnavailableError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import FINAL, Decision, RequestRecord, Route, State
from modm_tasks.queues import COMPLETIONS
from modm_tasks.queues import queue as make_queue
from modm_tasks.redis_client import short
from orchestrator.decisions.routing import parameters
from orchestrator.open_requests import Vector
from orchestrator.pipeline import Pipeline
from vector_store.cache import ImageCache
from vector_store.embedder import decode_vector
from vector_store.entries import ImageEntry

log = logging.getLogger(__name__)

#: What was being routed while an image entered is in no queue at that moment, so the image is looked at again later.
AGAIN_S = 0.5


class Admission:
    """Two threads: one listens on the broker, one does the work, so that a slow cache never delays the listener."""

    def __init__(
        self,
        app: Celery,
        ledger: Ledger,
        cache: ImageCache,
        pipeline: Pipeline,
        *,
        observe: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.app, self.ledger, self.cache, self.pipeline = app, ledger, cache, pipeline
        self.router = pipeline.router
        self.observe = observe
        self.queue = make_queue(COMPLETIONS)
        self._turn_s: dict[str, float] = {}
        self._fresh: deque[tuple[float, RequestRecord, ImageEntry, Vector]] = deque(maxlen=4096)
        self._inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._listen, name="completions", daemon=True),
            threading.Thread(target=self._work, name="admission", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._end.set()
        self._inbox.put(None)
        for thread in self._threads:
            thread.join(timeout=15)

    def put(self, request_id: str) -> None:
        self._inbox.put(request_id)

    # --- threads ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        options = dict(self.app.conf.broker_transport_options)
        # No polling interval: it would space out messages that lie there already (measured: 2 a second instead of 900).
        options.pop("polling_interval", None)
        while not self._end.is_set():
            try:
                connection = self.app.connection_for_read(transport_options=options)
                # Not acknowledged: that costs three round trips and two more keys, and the ledger knows what is finished.
                consumer = Consumer(connection, [self.queue], callbacks=[self._receive], accept=["json"], no_ack=True)
                with connection, consumer:
                    while not self._end.is_set():
                        with contextlib.suppress(TimeoutError):
                            connection.drain_events(timeout=1)
            except Exception as error:  # kombu raises the transport's own errors
                log.warning("completions: %s; trying again", short(error))
                self._end.wait(0.5)

    def _receive(self, body: dict[str, Any], _message: Any) -> None:
        self._inbox.put(str(body.get("request_id", "")))

    def _work(self) -> None:
        while (request_id := self._inbox.get()) is not None:
            try:
                self.admit(request_id)
            except NotFoundError:
                continue
            except UnavailableError as error:
                log.warning("not admitted yet: %s", error, extra={"request_id": request_id})
            except Exception:
                log.exception("not admitted; the watchdog tries again", extra={"request_id": request_id})

    # --- what is done -------------------------------------------------------------------------------------------

    def admit(self, request_id: str) -> None:
        """Admit one finished image. Twice does no harm."""
        record = self.ledger.get(request_id)
        if record.state in FINAL and record.state is not State.DONE:
            self.pipeline.forget(request_id)
            self.wake_waiters(request_id)
        if record.state is not State.DONE or record.admitted_s is not None or record.completion is None:
            return
        image_text, text_text = self.ledger.field(request_id, "ivec"), self.ledger.field(request_id, "tvec")
        vector = decode_vector(image_text) if image_text else None
        score = None
        if vector is not None and text_text:
            text = decode_vector(text_text)
            score = float(text @ vector) if text.shape == vector.shape else None
        if record.completion.embedder != self.cache.embedder_identity:
            vector = None  # of a worker with another embedder: it must not enter this collection
        entry = self._entry(record) if vector is not None and self._enters(record) else None
        if entry is not None and vector is not None:
            self.cache.add(entry, vector)
            self.cache.evict(record.request.namespace, self.ledger.in_use)
        self.pipeline.forget(request_id)
        waiting = self.ledger.waiters(request_id)
        self.ledger.admitted(request_id, score)
        for waiter in waiting:
            self.look_at_waiter(waiter)
        if entry is not None and vector is not None:
            self._rebind(record, entry, vector)
            self._fresh.append((time.monotonic(), record, entry, vector))
        if self.observe is not None:
            self.observe(self.ledger.get(request_id))

    def _enters(self, record: RequestRecord) -> bool:
        assert record.completion is not None
        if record.request.cache == "no-store":
            return False
        drawn = record.decision is None or record.decision.route is Route.LARGE_GEN
        large = drawn and record.completion.depth == 0  # a fallback is refined, whatever it was sent to
        return large or (self.ledger.recent_control().cache_admission or self.cache.settings.cache.admission) == "all"

    @staticmethod
    def _entry(record: RequestRecord) -> ImageEntry:
        done, request, decision = record.completion, record.request, record.decision
        assert done is not None
        return ImageEntry(
            id=record.id,
            prompt=request.prompt,
            model=done.model,
            seed=done.seed,
            size=f"{done.width}x{done.height}",
            depth=done.depth,
            created_s=record.done_s or time.time(),
            uri=done.uri,
            client=request.client,
            namespace=request.namespace,
            source_id=decision.source_id if decision else None,
            skipped_steps=done.skipped_steps,
            parameters=parameters(request),
        )

    def wake_waiters(self, source_id: str) -> None:
        """The source ended without an image: whoever waits on it is routed anew."""
        for waiter in self.ledger.waiters(source_id):
            self.look_at_waiter(waiter)

    def look_at_waiter(self, request_id: str, *, now_s: float | None = None) -> None:
        """Route a waiting request whose source has ended, or whose patience has."""
        try:
            record = self.ledger.get(request_id)
        except NotFoundError:
            return
        source_id = self.ledger.field(request_id, "waits_on")
        text = self.ledger.field(request_id, "tvec")
        if record.state is not State.WAITING or source_id is None or text is None:
            return
        try:
            source = self.ledger.get(source_id)
        except NotFoundError:
            source = None
        ended = source is None or (source.state in FINAL and (source.state is not State.DONE or source.admitted_s))
        if not ended and not (now_s is not None and self._tired(record, now_s)):
            return
        self._turn_s.pop(request_id, None)
        try:
            decision = self.router.after_wait(record, decode_vector(text), source)
            if decision.route is Route.STORED:
                if self._answer_stored(record, decision):
                    return
                decision = self.router.after_wait(record, decode_vector(text), source, stored=False)
            if self.ledger.route(request_id, decision, expected=State.WAITING, rank=self.router.rank(record, decision)):
                self.pipeline.tokens.send(decision.route.value, request_id, decision)
                self.pipeline.remember(record, decode_vector(text), decision)
        except UnavailableError:
            raise
        except ModmError:
            log.exception("cannot route a waiter", extra={"request_id": request_id})

    def _answer_stored(self, record: RequestRecord, decision: Decision) -> bool:
        """An exact repeat that waited for its first: no worker has anything to do for it. False where the image is gone."""
        stored = self.router.stored_completion(record, decision)
        if stored is None or not self.ledger.finish_stored(record.id, stored, decision):
            return False
        self.pipeline.forget(record.id)
        self.wake_waiters(record.id)
        return True

    def _tired(self, record: RequestRecord, now_s: float) -> bool:
        """Whether a waiting request has waited longer than the bound since its own turn came."""
        if self.router.turn_is_ahead(record):
            return False
        since = self._turn_s.setdefault(record.id, now_s)
        return now_s - since > self.router.settings.routing.wait_bound_s

    def look_again(self) -> None:
        """Late binding for what was being routed when an image entered. Called by the watchdog."""
        while self._fresh and time.monotonic() - self._fresh[0][0] > AGAIN_S:
            self._rebind(*self._fresh[0][1:])
            self._fresh.popleft()

    def _rebind(self, record: RequestRecord, entry: ImageEntry, image_vector: Vector) -> None:
        """Late binding: queued requests that the new image makes hits, or better ones, are drawn from it."""
        found = self.router.late_candidates(record, image_vector)
        records = {r.id: r for r in self.ledger.get_many([candidate.id for candidate, _, _ in found])} if found else {}
        for candidate, text_vector, similarity in found:
            queued = records.get(candidate.id)
            if queued is None or queued.state is not State.QUEUED or queued.decision is None:
                continue
            decision = self.router.rebind(queued, text_vector, entry, similarity)
            if decision is not None and self.ledger.route(queued.id, decision, expected=State.QUEUED):
                if queued.decision.route is not decision.route:
                    self.pipeline.tokens.send(decision.route.value, queued.id, decision)
                self.pipeline.remember(queued, text_vector, decision)
