"""The completion message: a worker's word that a request has ended. It carries the id only; the ledger knows the rest."""

from __future__ import annotations

import logging

from celery import Celery

from modm_tasks.queues import COMPLETIONS, queue
from modm_tasks.redis_client import short

log = logging.getLogger(__name__)


def announce(app: Celery, request_id: str) -> None:
    """Tell the orchestrator. A word that is lost costs a second or two: its watchdog looks for finished work too."""
    try:
        with app.producer_pool.acquire(block=True, timeout=5) as producer:
            producer.publish(
                {"request_id": request_id},
                exchange="",  # the anonymous exchange: a named one that is not bound yet would lose the message silently
                routing_key=COMPLETIONS,
                declare=[queue(COMPLETIONS)],
                serializer="json",
                retry=True,
                retry_policy={"max_retries": 2, "interval_start": 0, "interval_step": 0.2},
            )
    except Exception as error:  # kombu raises the transport's own errors
        log.warning("completion not announced: %s", short(error), extra={"request_id": request_id})
