"""Tokens: Celery messages that say "this queue has work". The ledger knows which work; a token may be lost or doubled."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from celery import Celery

from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision
from modm_tasks.queues import TASK_OF_QUEUE
from modm_tasks.redis_client import short

log = logging.getLogger(__name__)

#: (queue, request id, decision): the last two are for Flower and logs.
Token = tuple[str, str, Decision | None]


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

    def warm_up(self) -> None:
        """Connect and declare the queues now: the first requests would wait some 100 ms for it."""
        try:
            with self.app.producer_or_acquire() as producer:
                for queue in TASK_OF_QUEUE:
                    producer.maybe_declare(self.app.amqp.queues[queue])
        except Exception as error:  # kombu raises the transport's own errors
            log.warning("the broker does not answer yet: %s", short(error))

    def send(self, queue: str, request_id: str, decision: Decision | None) -> None:
        """One token. Failing to send is no loss: the next look tops up."""
        self.send_many([(queue, request_id, decision)])

    def send_many(self, tokens: Sequence[Token]) -> None:
        """Several, with their task-sent events, in one flush of the broker's channel (kombu's own publish batch).

        Each is an ordinary Celery message; only the round trips are shared. A batch is not repeated by kombu when the
        connection breaks, so then they go one by one, which is: a token that comes twice does no harm. `warm_up` has
        declared the queues, and what is retried declares them again.
        """
        try:
            with self.app.producer_or_acquire() as producer, producer.batch():
                for token in tokens:
                    self._publish(token, producer=producer, retry=False, declare=())
        except Exception as error:  # kombu raises the transport's own errors
            log.debug("tokens are sent one by one: %s", short(error))
            self._one_by_one(tokens)

    def _one_by_one(self, tokens: Sequence[Token]) -> None:
        try:
            for token in tokens:
                self._publish(token)
        except Exception as error:
            log.warning("tokens not sent, will be topped up: %s", short(error))

    def _publish(self, token: Token, **options: Any) -> None:
        queue, request_id, decision = token
        numbers = (0, 0.0) if decision is None else (decision.skipped_steps, round(decision.similarity or 0.0, 4))
        args = [request_id, *numbers]
        self.app.send_task(
            TASK_OF_QUEUE[queue], args=args, argsrepr=repr(args), kwargsrepr="{}", queue=queue, **options
        )

    def top_up(self) -> int:
        """Compare tokens with ready requests; send what is missing for the second time running. Returns how many."""
        sent, counts = 0, self.ledger.counts()
        for queue in TASK_OF_QUEUE:
            missing = max(0, counts[f"ready:{queue}"] - self.ledger.list_length(queue))
            stands = min(missing, self._short_before[queue])
            self._short_before[queue] = missing - stands
            if stands:
                ready = self.ledger.ready(queue, limit=stands)
                self.send_many([(queue, request_id, None) for request_id, _ in ready])
                sent += len(ready)
        if sent:
            log.warning("%d tokens had vanished and were sent again", sent)
        return sent
