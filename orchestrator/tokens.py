"""Tokens: Celery messages that say "this queue has work". The ledger knows which work; a token may be lost or doubled."""

from __future__ import annotations

import logging
from collections import defaultdict

from celery import Celery

from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision
from modm_tasks.queues import TASK_OF_QUEUE
from modm_tasks.redis_client import short

log = logging.getLogger(__name__)


class Tokens:
    """Sends tokens, and sends those again that vanished.

    Redis loses a message when a worker is killed between pop and record (field measurement: 2 of 1,001 over 15 kills).
    The rule that mends it needs no bookkeeping: a queue's list must hold at least as many tokens as the ledger has ready
    requests. A shortfall that stands for two looks is topped up. A surplus token finds nothing and ends.
    """

    def __init__(self, app: Celery, ledger: Ledger) -> None:
        self.app = app
        self.ledger = ledger
        self._short_before: dict[str, int] = defaultdict(int)

    def send(self, queue: str, request_id: str, decision: Decision | None) -> None:
        """One token. Failing to send is no loss: the next look tops up."""
        numbers = [0, 0.0] if decision is None else [decision.skipped_steps, round(decision.similarity or 0.0, 4)]
        try:
            self.app.send_task(TASK_OF_QUEUE[queue], args=[request_id, *numbers], queue=queue)
        except Exception as error:  # kombu raises the transport's own errors
            log.warning("token not sent, will be topped up: %s", short(error), extra={"request_id": request_id})

    def top_up(self) -> int:
        """Compare tokens with ready requests; send what is missing for the second time running. Returns how many."""
        sent = 0
        for queue in TASK_OF_QUEUE:
            ready = self.ledger.ready(queue)
            missing = max(0, len(ready) - self.ledger.list_length(queue))
            stands = min(missing, self._short_before[queue])
            self._short_before[queue] = missing - stands
            for request_id, _ in ready[:stands]:
                self.send(queue, request_id, None)
                sent += 1
        if sent:
            log.warning("%d tokens had vanished and were sent again", sent)
        return sent
