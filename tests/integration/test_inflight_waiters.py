"""In-flight reuse end to end in one process: whatever becomes of a source, whoever waits on it goes on.

No thread runs: requests are routed, completions admitted and the watchdog looks when the test says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from modm_tasks.messages import Completion, Route, State, SubmitRequest
from orchestrator.pipeline import Routed
from tests.conftest import SettingsFactory
from tests.support.processes import wait_until
from tests.support.rig import FIRST, LARGE, OTHER, SECOND, SMALL, THIRD, MakeRig, Rig, rigs
from vector_store.embedder import encode_vector
from workers.serve import serve_one

#: Similar enough to FIRST for the lowest rung.
WEAK = "one lamp"


@pytest.fixture
def make_rig(settings: SettingsFactory) -> Iterator[MakeRig]:
    yield from rigs(settings)


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


def test_a_link_that_is_cancelled_lets_the_next_go_on(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second, third = (rig.submit(p) for p in (FIRST, SECOND, THIRD))
    assert rig.waits_on(third) == second
    rig.service.cancel(second)
    assert (rig.ready(LARGE), rig.ready(SMALL)) == ([first, third], [])
    assert "source cancelled" in rig.get(third).decision.reason  # type: ignore[union-attr]
    rig.draw(LARGE)
    assert (rig.ready(LARGE), rig.ready(SMALL)) == ([], [third]), "late binding finds what it might have waited on"


def test_waiting_is_on_earlier_requests_only_so_it_never_goes_round(make_rig: MakeRig) -> None:
    rig = make_rig()
    prompts = [FIRST.replace("six", f"x{i % 3}").replace("two", f"y{i % 2}") for i in range(12)]
    ids = [rig.service.submit(SubmitRequest(prompt=prompt)).id for prompt in prompts]
    rig.service.parts.pipeline.route_batch(ids[::2] + ids[1::2])  # the order of routing is not that of acceptance
    again = ids[4]
    assert rig.ledger.waiters(again)
    rig.ledger.end(again, State.FAILED, "x")
    rig.service.parts.admission.wake_waiters(again)
    rig.service.retry(again)
    rig.service.parts.pipeline.route_batch([again])
    sources = {i: source for i in ids if (source := rig.waits_on(i)) is not None}
    assert len(sources) > 3
    assert again in sources
    for waiter, source in sources.items():
        assert rig.get(source).accepted_s < rig.get(waiter).accepted_s


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


def test_a_queued_hit_takes_a_better_image_that_arrives_and_no_worse_one(make_rig: MakeRig) -> None:
    rig = make_rig()
    first = rig.submit(FIRST)
    rig.draw(LARGE)
    hits = {name: rig.submit(WEAK, features=name) for name in ("late-binding", "inflight")}
    before = rig.get(hits["late-binding"])
    assert before.decision.source_id == first  # type: ignore[union-attr]
    better = rig.submit(WEAK, cache="refresh", features="late-binding")
    rig.submit(FIRST, cache="refresh", features="late-binding")
    assert rig.draw(LARGE) == better
    after = rig.get(hits["late-binding"])
    assert after.decision is not None
    assert after.decision.source_id == better
    assert after.decision.skipped_steps > before.decision.skipped_steps  # type: ignore[union-attr]
    assert after.decision.reason.startswith("late binding: hit")
    assert (after.rank, after.state) == (before.rank, State.QUEUED)
    assert rig.get(hits["inflight"]).decision.source_id == first, "late binding is off for it"  # type: ignore[union-attr]
    assert set(rig.ready(SMALL)) == set(hits.values())
    rig.draw(LARGE)  # no better than what they have
    assert rig.get(hits["late-binding"]).decision == after.decision
    window = rig.ledger.window(window_s=60, bucket_s=10, now_s=rig.ledger.now_s())
    assert (window["hits"], window["misses"], window["rebound"]) == (2, 3, 1)
    assert window[f"k:{after.decision.skipped_steps}"] == window[f"k:{before.decision.skipped_steps}"] == 1  # type: ignore[union-attr]
    assert rig.ledger.in_use([first, better]) == {first, better}
    assert {rig.draw(SMALL), rig.draw(SMALL)} == set(hits.values())
    assert rig.get(hits["late-binding"]).completion.skipped_steps == after.decision.skipped_steps  # type: ignore[union-attr]


def test_late_binding_leaves_what_is_to_be_drawn_anew(make_rig: MakeRig) -> None:
    """It has its refined image already; a better source would refine a second time."""
    rig = make_rig()
    rig.submit(FIRST)
    rig.draw(LARGE)
    hit = rig.submit(SECOND, features="late-binding")
    claimed = rig.ledger.claim(SMALL, "w", lease_s=30)
    assert claimed is not None
    first = claimed.decision.source_id  # type: ignore[union-attr]
    completion = rig.get(first or "").completion
    assert completion is not None
    rig.ledger.reroute_to_large(hit, claimed.attempt, "scored too low", fallback=completion)
    better = rig.submit(SECOND, cache="refresh")
    rig.ledger.set_rank(better, 0.0)
    assert rig.draw(LARGE) == better
    assert (rig.ready(LARGE), rig.ready(SMALL)) == ([hit], [])


def test_late_binding_finds_a_miss_that_was_being_routed_when_the_image_entered(make_rig: MakeRig) -> None:
    rig = make_rig()
    first = rig.submit(FIRST, features="late-binding")
    request, pipeline = SubmitRequest(prompt=SECOND, features="late-binding"), rig.service.parts.pipeline
    second = rig.service.submit(request).id
    decided: list[Routed] = []
    pipeline._decide(rig.get(second), rig.service.parts.embedder.embed_texts([SECOND])[0], decided)
    assert rig.draw(LARGE) == first
    pipeline._queue(decided)
    assert rig.ready(LARGE) == [second]
    rig.looked(lambda: rig.ready(SMALL) == [second], "a second look at the new image")
    assert rig.ready(LARGE) == []


def test_late_binding_takes_no_image_that_was_refined_too_often(make_rig: MakeRig) -> None:
    """Found by `make chaos`: it looked at the new image only, and not at its depth."""
    rig = make_rig(cache={"max_depth": 0})
    rig.submit(FIRST)
    rig.draw(LARGE)
    bounded = rig.submit(SECOND, min_similarity=0.95, features="late-binding,drift")
    free = rig.submit(SECOND, min_similarity=0.95, features="late-binding")
    assert rig.ready(LARGE) == [bounded, free]
    refined = rig.submit(SECOND, features="late-binding,drift")
    assert rig.draw(SMALL) == refined
    assert rig.get(refined).completion.depth == 1  # type: ignore[union-attr]
    assert (rig.ready(LARGE), rig.ready(SMALL)) == ([bounded], [free])


def test_a_source_that_is_finished_while_no_orchestrator_runs_is_used_by_the_next_one(make_rig: MakeRig) -> None:
    rig = make_rig()
    source, waiter = rig.submit(FIRST), rig.submit(SECOND)
    rig.service.parts.cache.close()
    assert serve_one(rig.runtime, LARGE)["served"] == source
    new = make_rig()
    new.service.start()
    try:
        wait_until(lambda: new.get(waiter).state is State.QUEUED, 20, "the completion that nobody heard")
        assert new.ready(SMALL) == [waiter]
    finally:
        new.service.stop()


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
