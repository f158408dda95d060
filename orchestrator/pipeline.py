"""From accepted to queued: embed in batches, search, decide, enqueue.

Two threads, so that the embedder and the store work for the next requests while these are decided and queued. While a
batch is looked up the next requests gather; the deeper the backlog the better the batches. Decisions are the pure functions
of `decisions.routing`, made in the order of arrival by one thread; this module gathers their inputs and carries them out.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from modm_tasks.errors import InvalidInputError, ModmError, UnavailableError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, RequestRecord, Route, State
from orchestrator.gather import gather
from orchestrator.open_requests import OpenRequest, OpenRequests, Vector
from orchestrator.router import Router
from orchestrator.tokens import Tokens
from vector_store.embedder import Embedder, decode_vector, encode_vector
from vector_store.entries import Match

log = logging.getLogger(__name__)
#: Most prompts embedded at once, requests queued in one round trip, and searches made together: small, so that the first
#: need not wait long.
BATCH, FLUSH, AHEAD = 64, 16, 8
#: Uses of cached images are stored so many at a time, and by the watchdog.
USES = 64

Routed = tuple[RequestRecord, Vector, Decision]


class Looked(NamedTuple):
    """A request, its text vector and the images near it; None = to be searched when it is decided."""

    record: RequestRecord
    vector: Vector
    near: Sequence[Match] | None


class Pipeline:
    """Routes what is put into it. ``put`` may be called from any thread, with an id that is in already or has moved on."""

    def __init__(
        self,
        ledger: Ledger,
        embedder: Embedder,
        router: Router,
        tokens: Tokens,
        *,
        observe: Callable[[RequestRecord, Decision], None] | None = None,
    ) -> None:
        self.ledger, self.embedder, self.router, self.tokens = ledger, embedder, router, tokens
        self.observe = observe
        self.open_requests: OpenRequests = router.open_requests
        self.last_error: str | None = None
        self._inbox: queue.SimpleQueue[str | RequestRecord | None] = queue.SimpleQueue()
        #: Bounded, so that a backlog stands in the inbox, where it makes good batches.
        self._looked: queue.Queue[list[Looked] | None] = queue.Queue(maxsize=FLUSH // AHEAD)
        self._pending: set[str] = set()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run_look, name="lookup", daemon=True),
            threading.Thread(target=self._run_decide, name="pipeline", daemon=True),
        ]

    def start(self) -> None:
        self._recover()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._inbox.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)
        with contextlib.suppress(ModmError):
            self.write_uses()

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def put(self, request_id: str, record: RequestRecord | None = None) -> None:
        """``record`` as it was just accepted, where known: it need not be read again, and queueing checks its state."""
        with self._lock:
            if request_id in self._pending:
                return
            self._pending.add(request_id)
        self._inbox.put(record or request_id)

    def write_uses(self) -> None:
        """Store the uses of cached images that are still noted."""
        self.router.write_uses()

    def forget(self, request_id: str) -> None:
        """The request has ended: it is no source for later ones any more."""
        self.open_requests.remove(request_id)

    def _recover(self) -> None:
        """After a restart: the vectors of open requests come back from the ledger; unrouted ones are routed again."""
        for record in self.ledger.get_many(self.ledger.index("open", limit=1_000_000)):
            if record.state is State.ACCEPTED:
                self.put(record.id)
            elif text := self.ledger.field(record.id, "tvec"):
                vector = decode_vector(text)
                if vector.shape == (self.embedder.dim,):
                    self.remember(record, vector)

    def _run_look(self) -> None:
        while (batch := gather(self._inbox, BATCH)) is not None:
            left = {r if isinstance(r, str) else r.id for r in batch}
            try:
                for some in self._look(batch):
                    left.difference_update(one.record.id for one in some)
                    self._looked.put(some)
            except Exception as error:
                self._failed(error)
            finally:
                self._release(left)
        self._looked.put(None)

    def _run_decide(self) -> None:
        while (groups := gather(self._looked, FLUSH // AHEAD)) is not None:
            looked = [one for some in groups for one in some]
            try:
                self._decide_all(looked)
                self.last_error = None
            except Exception as error:
                self._failed(error)
            finally:
                self._release([one.record.id for one in looked])

    def _failed(self, error: Exception) -> None:
        """Nothing is lost: the requests are still accepted in the ledger, and the watchdog puts them in again."""
        if not isinstance(error, UnavailableError):
            log.error("routing failed, will be tried again", exc_info=error)
        self.last_error = f"routing: {str(error)[:200]}"

    def _release(self, ids: Collection[str]) -> None:
        with self._lock:
            self._pending.difference_update(ids)

    def route_batch(self, batch: Sequence[str | RequestRecord]) -> None:
        """Embed these accepted requests as one batch and queue each. Those that have moved on are left alone."""
        for looked in self._look(batch):
            self._decide_all(looked)
        self.write_uses()

    def _look(self, batch: Sequence[str | RequestRecord]) -> Iterator[list[Looked]]:
        unread = [r for r in batch if isinstance(r, str)]
        records = [r for r in batch if isinstance(r, RequestRecord)]
        if unread:
            records += [r for r in self.ledger.get_many(unread) if r.state is State.ACCEPTED]
        if not records:
            return
        rows = np.asarray(self.embedder.embed_texts([r.request.prompt for r in records]), dtype=np.float32)
        asked = list(zip(records, rows, strict=True))
        for start in range(0, len(asked), AHEAD):
            some = asked[start : start + AHEAD]
            self.router.write_uses(at_least=USES)
            near = self.router.look_ahead(some)
            yield [Looked(record, vector, near.get(record.id)) for record, vector in some]

    def _decide_all(self, looked: Sequence[Looked]) -> None:
        decided = list[Routed]()
        for one in looked:
            self._decide_or_fail(one.record, one.vector, decided, one.near)
        self._queue(decided)

    def _decide_or_fail(
        self, record: RequestRecord, vector: Vector, decided: list[Routed], near: Sequence[Match] | None
    ) -> None:
        """What cannot be decided fails alone."""
        try:
            self._decide(record, vector, decided, near)
        except UnavailableError:
            raise
        except InvalidInputError as error:
            self.ledger.end(record.id, State.FAILED, str(error))
        except ModmError:
            log.exception("cannot route", extra={"request_id": record.id})
            self.ledger.end(record.id, State.FAILED, "the router failed; see the orchestrator's log")

    def _decide(
        self, record: RequestRecord, vector: Vector, decided: list[Routed], near: Sequence[Match] | None = None
    ) -> None:
        """Decide one request. What is simply queued is added to ``decided``; a wait or a stored answer is done at once."""
        decision = self.router.decide(record, vector, near=near)
        if decision.waits_on is not None:
            self._queue(decided)  # the source may be among them
            answer = self.ledger.wait_on(
                record.id, decision.waits_on, decision, until_s=self.ledger.now_s(), text_vector=encode_vector(vector)
            )
            if answer == "ok":
                self.remember(record, vector, decision)
                self.router.hasten(decision)
                return
            decision = self.router.decide(record, vector, inflight=False)
        if decision.route is Route.STORED:
            stored = self.router.stored_completion(record, decision)
            if stored is not None and self.ledger.finish_stored(record.id, stored, decision):
                return
            decision = self.router.decide(record, vector, stored=False)
        # Remembered before it is queued, so that the next of the batch may wait on it.
        self.remember(record, vector, decision)
        decided.append((record, vector, decision))
        if len(decided) >= FLUSH:
            self._queue(decided)

    def _queue(self, decided: list[Routed]) -> None:
        """Move the decided requests to their queues, send their tokens, and empty the list."""
        if not decided:
            return
        moved = self.ledger.route_many(
            [(r.id, d, encode_vector(vector), self.router.rank(r, d)) for r, vector, d in decided]
        )
        self.tokens.send_many([(d.route.value, r.id, d) for (r, _, d), ok in zip(decided, moved, strict=True) if ok])
        for (record, _, decision), ok in zip(decided, moved, strict=True):
            if not ok:
                self.forget(record.id)  # cancelled meanwhile
                continue
            if self.observe is not None:
                self.observe(record, decision)
            log.info(
                decision.reason,
                extra={"request_id": record.id, "route": decision.route.value, "similarity": decision.similarity,
                       "k": decision.skipped_steps},
            )  # fmt: skip
        decided.clear()

    def remember(self, record: RequestRecord, vector: Vector, decision: Decision | None = None) -> None:
        decision = decision or record.decision
        source = self.open_requests.get(decision.waits_on) if decision is not None and decision.waits_on else None
        self.open_requests.put(
            OpenRequest(
                id=record.id,
                namespace=record.request.namespace,
                size=record.request.size,
                client=record.request.client,
                order=record.accepted_s,
                chain_depth=0 if source is None else source[0].chain_depth + 1,
                is_miss=decision is not None and decision.route is Route.LARGE_GEN and decision.waits_on is None,
                rung=self.router.late_rung(record, decision),
                prompt=record.request.prompt,
                seed=record.request.seed,
            ),
            vector,
        )
