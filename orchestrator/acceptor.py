"""Requests that arrive together are made durable in one round trip, by one thread.

While one batch is with Redis the next gathers, so a lone request waits for nobody and a crowd shares the cost. Measured
by `ops/benchmarks/front.py`: a thread and a round trip for each call cost more than all the rest of accepting it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

from modm_tasks.errors import ModmError, UnavailableError
from modm_tasks.messages import RequestRecord, SubmitRequest
from orchestrator.gather import gather

#: Most requests of one round trip: small, so that the first is answered soon.
BATCH = 32

Accepted = RequestRecord | ModmError


class Acceptor:
    """``accept_each`` takes some requests and gives for each its record, or the error that is its answer."""

    def __init__(self, accept_each: Callable[[Sequence[SubmitRequest]], Sequence[Accepted]]) -> None:
        self._accept_each = accept_each
        self._inbox: queue.SimpleQueue[tuple[SubmitRequest, Future[RequestRecord]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="acceptor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What has been put in is still accepted."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def put(self, request: SubmitRequest) -> Future[RequestRecord]:
        """The future ends with the record, or raises the refusal. Cancelled before its turn, it is not accepted."""
        future: Future[RequestRecord] = Future()
        if not self._thread.is_alive():
            future.set_exception(UnavailableError("the orchestrator is stopping"))
        else:
            self._inbox.put((request, future))
        return future

    def _run(self) -> None:
        while (batch := gather(self._inbox, BATCH)) is not None:
            self._accept([(r, f) for r, f in batch if f.set_running_or_notify_cancel()])
        with contextlib.suppress(queue.Empty):
            while True:
                if (late := self._inbox.get_nowait()) is not None:
                    late[1].set_exception(UnavailableError("the orchestrator is stopping"))

    def _accept(self, batch: Sequence[tuple[SubmitRequest, Future[RequestRecord]]]) -> None:
        if not batch:
            return
        try:
            answers = self._accept_each([request for request, _ in batch])
        except Exception as error:  # each caller is told; the thread goes on
            answers = [error if isinstance(error, ModmError) else ModmError(f"accepting failed: {error}")] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            with contextlib.suppress(InvalidStateError):
                if isinstance(answer, ModmError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
