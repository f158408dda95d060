"""In-flight reuse end to end in one process: whatever becomes of a source, whoever waits on it goes on.

No thread runs: requests are routed, completions admitted and the watchdog looks when the test says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Completion, RequestRecord, Route, State, SubmitRequest
from modm_tasks.settings import WorkerSettings
from orchestrator.build import build_service
from orchestrator.service import Service
from tests.conftest import SettingsFactory
from tests.support.processes import wait_until
from vector_store.embedder import encode_vector, load_embedder
from workers.runtime import Runtime
from workers.serve import serve_one
from workers.testing import FakeEngine

LARGE, SMALL = "large-gen", "small-refine"
FIRST, SECOND, THIRD = "one two three four five six", "one two three four five seven", "one two three nine five seven"
OTHER = "purple zebras juggle quietly beneath marble"


class Rig:
    """A service whose threads were not started, and a worker that draws when asked."""

    def __init__(self, service: Service) -> None:
        self.service, settings = service, service.settings
        engine = FakeEngine(settings)
        engine.load([settings.large_model, settings.small_model])
        self.runtime = Runtime(
            settings, worker="gpu0@test", engine=engine, embedder=load_embedder("fake"),
            store=ImageStore(settings.image_root), ledger=Ledger.from_settings(settings),
        )  # fmt: skip
        self.ledger = service.ledger

    def submit(self, prompt: str, **fields: Any) -> str:
        """Accept and route."""
        request_id = self.service.submit(SubmitRequest(prompt=prompt, **fields)).id
        self.service.parts.pipeline.route_batch([request_id])
        return request_id

    def draw(self, queue: str) -> str:
        """The worker serves the best of a queue and its completion arrives."""
        served = str(serve_one(self.runtime, queue)["served"])
        self.service.parts.admission.admit(served)
        return served

    def get(self, request_id: str) -> RequestRecord:
        return self.ledger.get(request_id)

    def waits_on(self, request_id: str) -> str | None:
        return self.ledger.field(request_id, "waits_on") if self.get(request_id).state is State.WAITING else None

    def ready(self, queue: str) -> list[str]:
        return [request_id for request_id, _ in self.ledger.ready(queue)]

    def looked(self, done: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            self.service.parts.watchdog.look()
            return done()

        wait_until(look, 20, what)


MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(settings: SettingsFactory) -> Iterator[MakeRig]:
    made: list[Rig] = []

    def make(**overrides: Any) -> Rig:
        worker = WorkerSettings(engine="fake", fake_large_s=0, fake_small_s=0, mode="pooled", max_attempts=1)
        made.append(Rig(build_service(settings(**({"worker": worker, "embedder": "fake"} | overrides)))))
        return made[-1]

    yield make
    for rig in made:
        rig.service.parts.cache.close()
        rig.runtime.ledger.redis.close()


def failed(rig: Rig, source: str) -> None:
    claimed = rig.ledger.claim(LARGE, "w", lease_s=30)
    assert claimed is not None
    rig.ledger.fail(source, claimed.attempt, "broken", retry=False)
    rig.service.parts.admission.admit(source)


def died(rig: Rig, source: str) -> None:
    assert rig.ledger.claim(LARGE, "w", lease_s=0.01) is not None
    rig.looked(lambda: rig.get(source).state is State.FAILED, "the lease to expire")


def cancelled(rig: Rig, source: str) -> None:
    rig.service.cancel(source)


def forgotten(rig: Rig, source: str) -> None:
    rig.ledger.end(source, State.FAILED, "x")
    rig.ledger.forget(source)
    rig.service.parts.watchdog.look()


@pytest.mark.parametrize("end", [failed, died, cancelled, forgotten])
def test_a_waiter_goes_on_at_its_old_place_when_its_source_ends_without_an_image(
    make_rig: MakeRig, end: Callable[[Rig, str], None]
) -> None:
    rig = make_rig()
    source, waiter = rig.submit(FIRST), rig.submit(SECOND)
    later = rig.submit(OTHER)
    assert rig.waits_on(waiter) == source
    end(rig, source)
    record = rig.get(waiter)
    assert record.state is State.QUEUED
    assert record.decision is not None
    assert record.decision.route is Route.LARGE_GEN
    assert record.decision.reason.startswith("after waiting (source ")
    assert rig.ready(LARGE) == [waiter, later]


def test_a_chain_is_refined_link_by_link(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second, third = (rig.submit(p) for p in (FIRST, SECOND, THIRD))
    assert (rig.waits_on(second), rig.waits_on(third)) == (first, second)
    assert rig.draw(LARGE) == first
    assert rig.ready(SMALL) == [second]
    assert rig.waits_on(third) == second
    assert rig.draw(SMALL) == second
    assert rig.draw(SMALL) == third
    last = rig.get(third)
    assert last.completion is not None
    assert last.decision is not None
    assert (last.decision.source_id, last.completion.depth) == (second, 2)
    assert last.decision.predicted_similarity == pytest.approx(last.decision.similarity, abs=1e-4)


def test_no_chain_is_longer_than_allowed(make_rig: MakeRig) -> None:
    rig = make_rig(routing={"wait_depth": 1})
    first, second, third = (rig.submit(p) for p in (FIRST, SECOND, THIRD))
    assert (rig.waits_on(second), rig.waits_on(third)) == (first, first)


def test_waiting_is_bounded_from_the_waiters_own_turn(make_rig: MakeRig) -> None:
    rig = make_rig(routing={"wait_bound_s": 0.2})
    earlier, source, waiter = rig.submit(OTHER), rig.submit(FIRST), rig.submit(SECOND)
    started = rig.ledger.claim(LARGE, "w", lease_s=60)
    assert started is not None
    behind = rig.ready(LARGE)
    rig.service.parts.watchdog.look()
    wait_until(lambda: rig.ledger.now_s() > rig.get(waiter).accepted_s + 0.3, 5, "longer than the bound")
    rig.service.parts.watchdog.look()
    assert rig.waits_on(waiter) == source, "an earlier request still waits for a worker, so waiting costs nothing"
    assert started.id in {earlier, source}
    assert rig.ledger.claim(LARGE, "w", lease_s=60).id in behind  # type: ignore[union-attr]
    rig.looked(lambda: rig.get(waiter).state is State.QUEUED, "the waiter to give up")
    assert "source running" in rig.get(waiter).decision.reason  # type: ignore[union-attr]


def test_a_source_that_others_wait_on_goes_first(make_rig: MakeRig) -> None:
    rig = make_rig(slo={"large_latency_s": 60.0})
    earlier, source = rig.submit(OTHER), rig.submit(FIRST)
    assert rig.ready(LARGE) == [earlier, source]
    waiter = rig.submit(SECOND)
    assert rig.waits_on(waiter) == source
    assert rig.ready(LARGE) == [source, earlier]


def test_a_wrong_prediction_is_a_miss_at_once(make_rig: MakeRig) -> None:
    rig = make_rig()
    source, waiter = rig.submit(FIRST), rig.submit(SECOND)
    claimed = rig.ledger.claim(LARGE, "w", lease_s=30)
    assert claimed is not None
    vector = encode_vector(rig.service.parts.embedder.embed_texts([OTHER])[0])
    completion = Completion(
        uri=rig.runtime.store.path_for(source, 1), width=64, height=64, seed=1, model="scenes-large", steps_run=50,
        skipped_steps=0, depth=0, gpu_s=1.0, vector=vector, embedder=rig.service.parts.embedder.identity,
    )  # fmt: skip
    rig.ledger.finish(source, claimed.attempt, completion)
    rig.service.parts.admission.admit(source)
    decision = rig.get(waiter).decision
    assert decision is not None
    assert decision.route is Route.LARGE_GEN
    assert decision.predicted_similarity is not None
    assert decision.similarity is not None
    assert decision.predicted_similarity > 0.5 > 0.25 > decision.similarity
    assert rig.ready(LARGE) == [waiter]


def test_a_queued_miss_becomes_a_hit_when_an_image_like_it_arrives(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second = (rig.submit(p, features="late-binding") for p in (FIRST, SECOND))
    assert rig.ready(LARGE) == [first, second]
    assert rig.draw(LARGE) == first
    assert (rig.ready(LARGE), rig.ready(SMALL)) == ([], [second])
    assert rig.get(second).decision.reason.startswith("late binding: hit")  # type: ignore[union-attr]
    assert serve_one(rig.runtime, LARGE)["served"] is None  # the stale task finds nothing


def test_waiters_survive_a_restart_and_open_requests_are_sources_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    source, waiter = rig.submit(FIRST), rig.submit(SECOND)
    rig.service.parts.cache.close()
    new = make_rig()
    new.service.start()
    try:
        wait_until(lambda: len(new.service.parts.pipeline.open_requests) == 2, 20, "open requests from the ledger")
        third = new.service.submit(SubmitRequest(prompt=THIRD)).id
        wait_until(lambda: new.waits_on(third) == waiter, 20, "the new request to wait on an old one")
        assert serve_one(new.runtime, LARGE)["served"] == source
        wait_until(lambda: new.get(waiter).state is State.QUEUED, 20, "the watchdog to find that the source is done")
        assert new.ready(SMALL) == [waiter]
    finally:
        new.service.stop()
