"""Requests that arrive together are queued, and their tokens sent, as one batch: with the guarantees of a single one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest
import redis
from celery import Celery

from modm_tasks.app import make_app
from modm_tasks.messages import Decision, Route, State, SubmitRequest, new_request_id
from orchestrator.build import build_service
from orchestrator.service import Service
from orchestrator.tokens import Tokens
from tests.conftest import SettingsFactory

QUEUE = Route.LARGE_GEN.value
MISS = Decision(route=Route.LARGE_GEN, policy="modm", similarity=0.1)


@pytest.fixture
def service(settings: SettingsFactory) -> Iterator[Service]:
    """Not started: the test routes by hand. Closed at the end."""
    made = build_service(settings(embedder="fake"))
    yield made
    made.parts.cache.close()


def accept(service: Service, prompt: str, **more: str) -> str:
    return service.submit(SubmitRequest(prompt=prompt, **more)).id  # type: ignore[arg-type]


def _next(heard: redis.client.PubSub) -> str:
    message = heard.get_message(timeout=5)
    assert message is not None
    return str(message["data"].decode())


def test_a_batch_of_tokens_is_ordinary_celery_messages_and_events(service: Service, redis_url: str) -> None:
    tokens, ids = service.parts.tokens, [new_request_id() for _ in range(5)]
    with redis.Redis.from_url(redis_url).pubsub() as heard:
        heard.psubscribe("*celeryev/task.sent")
        heard.get_message(timeout=5)  # the subscription's own answer
        tokens.send_many([(QUEUE, i, MISS) for i in ids])
        bodies = [json.loads(base64.b64decode(json.loads(_next(heard))["body"])) for _ in ids]
    assert [json.loads(b["args"].replace("'", '"'))[0] for b in bodies] == ids
    assert {(b["type"], b["queue"], b["name"]) for b in bodies} == {("task-sent", QUEUE, "modm.large_gen")}
    # A stock Celery app without our settings reads them, first sent first.
    stock = Celery(broker=redis_url)
    with stock.connection_for_read() as connection:
        queue = connection.SimpleQueue(QUEUE)
        for expected in ids:
            message = queue.get(timeout=5)
            message.ack()
            assert message.headers["task"] == "modm.large_gen"
            assert message.headers["id"] == message.properties["correlation_id"]
            assert message.payload[0] == [expected, 0, 0.1]


def test_tokens_survive_a_dropped_connection(service: Service) -> None:
    tokens, ledger = service.parts.tokens, service.ledger
    tokens.warm_up()
    ledger.redis.client_kill_filter(_type="normal", skipme=True)
    tokens.send_many([(QUEUE, new_request_id(), MISS) for _ in range(3)])
    assert ledger.list_length(QUEUE) == 3


def test_no_broker_is_no_error(settings: SettingsFactory, service: Service) -> None:
    away = settings(redis_url="redis://127.0.0.1:1/0")
    Tokens(make_app(away), service.ledger).send(QUEUE, new_request_id(), MISS)
    assert service.ledger.list_length(QUEUE) == 0


def test_the_later_of_a_batch_may_wait_on_the_earlier(service: Service) -> None:
    ids = [accept(service, "a red circle on plain grey", policy="modm-plus") for _ in range(2)]
    service.parts.pipeline.route_batch(ids)
    first, second = service.ledger.get_many(ids)
    assert (first.state, second.state) == (State.QUEUED, State.WAITING)
    assert service.ledger.field(second.id, "waits_on") == first.id


def test_one_that_was_cancelled_meanwhile_is_neither_queued_nor_a_source(service: Service) -> None:
    records = [service.submit(SubmitRequest(prompt=f"a red circle {n}", policy="modm-plus")) for n in range(2)]
    service.ledger.cancel(records[0].id)
    service.parts.pipeline.route_batch(records)  # as they were accepted: the batch does not know it yet
    first, second = service.ledger.get_many([r.id for r in records])
    assert (first.state, second.state) == (State.CANCELLED, State.QUEUED)
    assert service.parts.pipeline.open_requests.get(first.id) is None
    assert service.parts.pipeline.open_requests.get(second.id) is not None
    assert service.ledger.list_length(QUEUE) == 1


def test_a_redis_that_forgot_the_scripts_is_taught_again(service: Service) -> None:
    ids = [accept(service, f"prompt number{n}") for n in range(3)]
    service.ledger.redis.script_flush()
    moved = service.ledger.route_many([(i, MISS, "", None) for i in ids])
    assert moved == [True] * 3
    assert service.ledger.route_many([(ids[0], MISS, "", None)]) == [False]


def test_a_batch_is_queued_with_tokens_in_order(service: Service) -> None:
    ids = [accept(service, f"prompt number{n}", policy="modm") for n in range(40)]
    service.parts.pipeline.route_batch(ids)
    assert [i for i, _ in service.ledger.ready(QUEUE)] == ids
    assert service.ledger.list_length(QUEUE) == 40
    assert {r.state for r in service.ledger.get_many(ids)} == {State.QUEUED}
    assert service.ledger.counts()["accepted"] == 0
