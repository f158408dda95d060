"""Celery remote control of named workers, with the cautions that measurements ask for (docs/controller.md).

* A reply to ``add_consumer`` and ``cancel_consumer`` comes *before* the change, so callers verify by ``active_queues``.
* The first call after the broker restarted fails on a stale pooled connection: one retry.
* With named destinations a call returns at the last reply; a worker that is silent costs the whole timeout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from celery import Celery
from celery.utils.nodenames import worker_direct
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from modm_tasks.app import make_app
from modm_tasks.errors import UnavailableError
from modm_tasks.queues import PREPARE, Role
from modm_tasks.redis_client import short
from modm_tasks.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

BROKER_ERRORS = (OSError, OperationalError, RedisError)


class RemoteControl:
    """Talks to worker parents, which answer while their GPU child is busy. Not thread-safe."""

    def __init__(self, app: Celery, *, timeout_s: float = 1.0) -> None:
        self.app = app
        self.timeout_s = timeout_s

    @classmethod
    def from_settings(cls, settings: Settings, *, timeout_s: float = 1.0) -> RemoteControl:
        """Its own app: unlike a worker, the controller must not wait for a lost broker for ever."""
        app = make_app(settings)
        app.conf.broker_transport_options = app.conf.broker_transport_options | {
            "max_retries": 1, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2,
        }  # fmt: skip
        return cls(app, timeout_s=timeout_s)

    def active_queues(self, workers: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Ordered queue names of those that answered. Raises UnavailableError where the broker does not answer."""
        if not workers:
            return {}
        replies = self._call("active_queues", workers)
        return {w: tuple(str(q["name"]) for q in rows) for w, rows in replies.items() if isinstance(rows, list)}

    def send(self, action: str, queue: str, workers: Collection[str]) -> set[str]:
        """``add`` or ``cancel`` a queue; returns who acknowledged (not: who has done it)."""
        replies = self._call(f"{action}_consumer", workers, {"queue": queue})
        return {w for w, reply in replies.items() if isinstance(reply, Mapping) and "ok" in reply}

    def prepare(self, worker: str, role: Role) -> None:
        """Ask a worker, by its own queue, to load the model of a role. Raises UnavailableError."""
        self._retry(lambda: self.app.send_task(PREPARE, args=[role], queue=worker_direct(worker)))

    def close(self) -> None:
        self.app.close()

    def _call(self, command: str, workers: Collection[str], arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        names = sorted(workers)

        def once() -> dict[str, Any]:
            rows = self.app.control.broadcast(
                command, arguments=arguments, destination=names, reply=True, timeout=self.timeout_s, limit=len(names)
            )
            return {name: reply for row in rows or [] for name, reply in row.items()}

        return self._retry(once)

    def _retry(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except BROKER_ERRORS as error:
            log.info("control call failed, trying once more: %s", short(error))
        try:
            return call()
        except BROKER_ERRORS as error:
            raise UnavailableError(f"the broker does not answer: {short(error)}") from error
