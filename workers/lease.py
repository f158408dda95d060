"""Keeping a claim alive while the engine draws, and hearing of cancellation.

A claim is a lease (architecture.md, One ledger). Two things renew it: a thread, every third of its life, so that a long
step does not lose it; and the step callback, at most every ``BEAT_S``, which also publishes progress and brings a
cancellation within one step. When Redis is away the image is drawn on; `finish` decides whether it is still ours.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modm_tasks.errors import (
    CancelledByUserError,
    EngineError,
    LeaseLostError,
    UnavailableError,
)

if TYPE_CHECKING:
    from modm_tasks.ledger import Ledger

log = logging.getLogger(__name__)

#: Shortest time between two renewals out of the step callback. A renewal costs about 0.3 ms.
BEAT_S = 0.2


class Lease:
    """Context manager around one attempt. ``on_step`` is the engine's step callback."""

    def __init__(self, ledger: Ledger, request_id: str, attempt: int, *, lease_s: float, limit_s: float) -> None:
        self._ledger, self._id, self._attempt = ledger, request_id, attempt
        self._lease_s, self._limit_s = lease_s, limit_s
        self._began = self._beaten = time.monotonic()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._step = 0
        self._stop: CancelledByUserError | LeaseLostError | None = None
        self._thread = threading.Thread(target=self._run, name=f"lease-{request_id[:8]}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def check(self) -> None:
        """Raise CancelledByUserError or LeaseLostError if that is what the last renewal said."""
        if self._stop is not None:
            raise self._stop

    def on_step(self, done: int, total: int) -> None:
        """Note progress; raise what ends the run: cancelled, lease lost, or longer than the task's time limit."""
        self._step = done
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._renew()
        self.check()
        if now - self._began > self._limit_s:
            raise EngineError(
                f"drawing took longer than {self._limit_s:g} s, 0.9 of worker.task_time_limit_s (step {done}/{total})"
            )

    def _run(self) -> None:
        while not self._end.wait(self._lease_s / 3):
            self._renew()

    def _renew(self) -> None:
        with self._lock:
            self._beaten = time.monotonic()
            try:
                if self._ledger.renew(self._id, self._attempt, self._lease_s, step=self._step) == "cancelled":
                    self._stop = CancelledByUserError()
            except LeaseLostError as error:
                self._stop = error
            except UnavailableError as error:
                log.warning("cannot renew the lease of %s: %s", self._id, error)
