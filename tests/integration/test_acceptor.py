"""Requests of several callers share one round trip to the ledger; each has an answer of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from modm_tasks.errors import InvalidInputError, ModmError, RefusedError, UnavailableError
from modm_tasks.messages import RequestRecord, State, SubmitRequest
from orchestrator.acceptor import BATCH, Accepted, Acceptor
from orchestrator.build import build_service
from orchestrator.service import Service
from tests.conftest import SettingsFactory

LIMIT = 5


@pytest.fixture
def service(settings: SettingsFactory) -> Iterator[Service]:
    """Not started: nothing is routed, so all that is accepted stays open."""
    made = build_service(settings(embedder="fake", slo={"max_open_requests": LIMIT}))
    yield made
    made.parts.cache.close()


def ask(prompt: str, **more: str) -> SubmitRequest:
    return SubmitRequest(prompt=prompt, **more)  # type: ignore[arg-type]


class Gate:
    """Lets the ledger's side be as slow as a test needs it, and notes the batches."""

    def __init__(self, service: Service) -> None:
        self.service, self.open, self.entered = service, threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __call__(self, requests: Sequence[SubmitRequest]) -> Sequence[Accepted]:
        self.batches.append(len(requests))
        self.entered.set()
        assert self.open.wait(20)
        return self.service.submit_each(requests)


def test_each_of_a_batch_is_accepted_or_refused_by_itself(service: Service) -> None:
    twice = {"idempotency_key": "once"}
    answers = service.submit_each(
        [ask("a"), ask("b", policy="nonsense"), ask("c", **twice), ask("c", **twice), *(ask(f"d{n}") for n in range(4))]
    )
    accepted = [a for a in answers if isinstance(a, RequestRecord)]
    assert [type(a) for a in answers[1::6]] == [InvalidInputError, RefusedError]
    assert answers[2] == answers[3], "an idempotency key is one request, also within one batch"
    assert len({r.id for r in accepted}) == LIMIT
    assert service.ledger.counts()["accepted"] == LIMIT
    assert service.ledger.get(accepted[0].id).request.prompt == "a"


def test_a_known_request_that_cannot_be_read_fails_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.submit(ask("a", idempotency_key="once"))

    def away(request_id: str) -> RequestRecord:
        raise UnavailableError(f"Redis does not answer for {request_id}")

    monkeypatch.setattr(service.ledger, "get", away)
    known, fresh = service.submit_each([ask("a", idempotency_key="once"), ask("b")])
    assert isinstance(known, UnavailableError)
    assert isinstance(fresh, RequestRecord)


def test_what_gathers_while_redis_answers_goes_as_one_batch(service: Service) -> None:
    gate = Gate(service)
    acceptor = Acceptor(gate)
    acceptor.start()
    first = acceptor.put(ask("first"))
    assert gate.entered.wait(20)
    later = [acceptor.put(ask(f"later {n}")) for n in range(LIMIT - 1)]
    hung_up = acceptor.put(ask("hung up"))
    assert hung_up.cancel()
    gate.open.set()
    assert [f.result(20).state for f in [first, *later]] == [State.ACCEPTED] * LIMIT
    refused = acceptor.put(ask("one too many"))
    with pytest.raises(RefusedError, match="limit"):
        refused.result(20)
    with pytest.raises(CancelledError):
        hung_up.result(20)
    assert gate.batches == [1, LIMIT - 1, 1]
    assert LIMIT - 1 < BATCH
    assert service.ledger.counts()["accepted"] == LIMIT, "who hung up before his turn was not accepted"
    acceptor.stop()


def test_an_outage_is_told_to_all_and_ended_by_the_next_answer(service: Service) -> None:
    down = [True]

    def accept_each(requests: Sequence[SubmitRequest]) -> Sequence[Accepted]:
        if down.pop() if down else False:
            raise UnavailableError("Redis does not answer: test")
        return service.submit_each(requests)

    acceptor = Acceptor(accept_each)
    acceptor.start()
    with pytest.raises(UnavailableError, match="Redis"):
        acceptor.put(ask("a")).result(20)
    assert acceptor.put(ask("b")).result(20).state is State.ACCEPTED
    acceptor.stop()
    with pytest.raises(ModmError, match="stopping"):
        acceptor.put(ask("c")).result(20)
