"""Mends what died: expired leases, vanished tokens, requests that a dead orchestrator left unrouted, sources that ended.
At its start it has cache and image store reconciled.

Every move is a compare-and-set in the ledger, so two orchestrators may watch the same one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from modm_tasks.errors import ModmError, UnavailableError
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import State
from orchestrator.admission import Admission
from orchestrator.pipeline import Pipeline
from orchestrator.reconcile import reconcile
from orchestrator.tokens import Tokens
from vector_store.cache import ImageCache

log = logging.getLogger(__name__)


class Watchdog:
    """One thread; each look takes milliseconds when nothing is wrong."""

    def __init__(
        self,
        ledger: Ledger,
        tokens: Tokens,
        pipeline: Pipeline,
        admission: Admission,
        cache: ImageCache,
        images: ImageStore,
        *,
        period_s: float = 1.0,
        keep_s: float = 86_400.0,
        keep: int = 200_000,
        stale_s: float = 2.0,
    ) -> None:
        self.ledger, self.tokens, self.pipeline, self.admission = ledger, tokens, pipeline, admission
        self.cache, self.images = cache, images
        self.period_s, self.keep_s, self.keep, self.stale_s = period_s, keep_s, keep, stale_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._reconciler = threading.Thread(
            target=reconcile, args=(cache, ledger, self._end), name="reconcile", daemon=True
        )

    def start(self) -> None:
        self._thread.start()
        self._reconciler.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        self._reconciler.join(timeout=10)

    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        down = False
        while not self._end.wait(self.period_s):
            try:
                self.look()
                if down:
                    log.info("the ledger is back")
                down = False
            except UnavailableError as error:
                if not down:
                    log.error("cannot watch: %s", error)
                down = True
            except Exception:
                log.exception("the watchdog met a bug and goes on")

    def look(self) -> None:
        """One round."""
        looks: tuple[Callable[[], object], ...] = (
            self._leases, self.tokens.top_up, self._unrouted, self._waiting, self._unadmitted, self.admission.look_again,
            self._open, self._trim, self.pipeline.write_uses,
        )  # fmt: skip
        for step in looks:
            step()

    def _leases(self) -> None:
        for request_id, state, queue in self.ledger.expire():
            log.warning("lease expired, now %s", state.value, extra={"request_id": request_id})
            if state is State.QUEUED:
                self.tokens.send(queue, request_id, self.ledger.get(request_id).decision)
            else:
                self.pipeline.forget(request_id)
                self.admission.wake_waiters(request_id)

    def _unrouted(self) -> None:
        before = self.ledger.now_s() - self.stale_s
        for request_id in self.ledger.index("accepted", newest_s=before):
            self.pipeline.put(request_id)

    def _waiting(self) -> None:
        now = self.ledger.now_s()
        for request_id in self.ledger.index("waiting"):
            self.admission.look_at_waiter(request_id, now_s=now)

    def _unadmitted(self) -> None:
        before = self.ledger.now_s() - self.stale_s
        for request_id in self.ledger.index("unadmitted", newest_s=before):
            self.admission.put(request_id)

    def _open(self) -> None:
        # Thousands of ids are read only where something is remembered that has ended.
        if len(self.pipeline.open_requests) > self.ledger.counts()["open"]:
            self.pipeline.open_requests.keep_only(self.ledger.index("open", limit=1_000_000))

    def _trim(self) -> None:
        for request_id, uri in self.ledger.trim(keep_s=self.keep_s, keep=self.keep):
            try:
                if uri and not self.cache.holds_uri(uri):
                    self.images.delete(uri)
            except ModmError as error:
                log.warning("image not deleted: %s", error, extra={"request_id": request_id})
