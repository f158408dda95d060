"""The simulator against runs that can be followed by hand, and what must hold for every run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modm_tasks.errors import InvalidInputError
from orchestrator.decisions.ladder import parse
from orchestrator.decisions.routing import FEATURES
from orchestrator.simulator.cache import Cache
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.engine import Simulation
from orchestrator.simulator.outcome import Outcome
from orchestrator.simulator.run import Load, check, simulate, statistical
from orchestrator.simulator.similarity import StatisticalSimilarities, VectorSimilarities
from vector_store.eviction import Held, Policy, choose, fifo

LADDER = parse(".95:30,.85:15")
A, B = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
NEAR_A = (0.96, 0.28, 0.0)  # cosine with A 0.96: k = 30


def run(rows: list[tuple[float, ...]], arrivals: list[float], *, warm: int = 0, **more: Any) -> Outcome:
    """One GPU, large 10 s, small 5 s (2 s at k = 30) unless told otherwise."""
    base: dict[str, Any] = {"gpus": 1, "large_s": 10.0, "small_s": 5.0, "ladder": LADDER}
    source = VectorSimilarities(np.array(rows), warm=warm, threshold=0.75)
    return Simulation(SimConfig(**(base | more)), source, arrivals).run()


def test_published_rules_find_finished_images_only() -> None:
    out = run([A, A, A], [0.0, 1.0, 25.0])
    # The second is routed while the first is drawn: a miss, 10..20. The third finds the first: k = 30, 25..27.
    assert out.end.tolist() == [10.0, 20.0, 27.0]
    assert out.k.tolist() == [-1, -1, 30]
    assert out.report()["requests"]["lost"] == 0


def test_inflight_reuse_waits_and_refines_what_it_waited_for() -> None:
    out = run([A, A, NEAR_A], [0.0, 1.0, 2.0], features=frozenset({"inflight"}))
    # The second waits on the first (10 s), is refined 10..12; the third waited on the best of both and goes 12..14.
    assert out.end.tolist() == [10.0, 12.0, 14.0]
    assert out.waited.tolist() == [False, True, True]


def test_late_binding_turns_a_queued_miss_into_a_hit() -> None:
    rows = [B, A, A]
    plain = run(rows, [0.0, 0.0, 0.0])
    late = run(rows, [0.0, 0.0, 0.0], features=frozenset({"late-binding"}))
    assert plain.end.tolist() == [10.0, 20.0, 30.0]
    assert late.end.tolist() == [10.0, 20.0, 22.0]
    assert late.rebound.tolist() == [False, False, True]


def test_repeats_bound_k_and_drift_bounds_depth() -> None:
    bounded = run([A, A], [0.0], warm=1, features=frozenset({"repeats"}), repeat_max_k=10)
    assert bounded.k[1] == 10
    chain = run([A, A, A], [0.0, 0.0], warm=1, features=frozenset({"drift"}), max_depth=0)
    # The first refinement has depth 1 and may serve nobody; the warm image of depth 0 serves both.
    assert chain.k.tolist() == [-1, 30, 30]


def test_a_wrong_prediction_goes_as_a_miss_in_its_old_place() -> None:
    # Texts 1 and 2 are alike, but the image of 1 is like neither: text 2 waits on 1 and is a miss when 1 is done.
    text = np.array([B, A, A, B])
    image = np.array([B, (0.0, 0.0, 1.0), A, B])
    source = VectorSimilarities(text, image=image, warm=1, threshold=0.75)
    config = SimConfig(gpus=1, large_s=10.0, small_s=5.0, ladder=LADDER, features=frozenset({"inflight"}))
    out = Simulation(config, source, [0.0, 1.0, 2.0]).run()
    # Row 3 is a hit on the warm image and goes first, as row 2 still waits at 10 s? No: row 2 has the earlier place.
    assert out.end.tolist()[1:] == [10.0, 20.0, 22.0]
    assert out.waited.tolist() == [False, False, True, False]


def test_admission_under_the_published_roles_looks_at_the_workers_of_the_own_role() -> None:
    rows = [A, B, (0.0, 0.0, 1.0), (0.577, 0.577, 0.577), NEAR_A]
    out = run(
        rows, [0.0, 1.0, 2.0, 3.0], warm=1, gpus=2, workers="roles", allocation="static", static_large=1, admit=True
    )
    # One large worker, 10 s a miss, SLO 20 s. The second miss waits 9 s and ends after 19; the third would wait 18 s: it is
    # refused, though the small worker idles, and the hit finds that one.
    assert out.end.tolist()[1:] == [10.0, 20.0, 2.0, 5.0]
    assert out.retry_s.tolist()[1:] == [0.0, 0.0, 8.0, 0.0]


def test_a_large_worker_refines_a_spare_hit_with_the_large_model() -> None:
    out = run([A, A], [0.0], warm=1, workers="roles", allocation="static", static_large=1)
    # 10 s * (1 - 30/50)
    assert out.end[1] == pytest.approx(4.0)
    assert out.report()["refined_by"] == {"large": 1}
    pooled = run([A, A], [0.0], warm=1, workers="pooled-roles", allocation="static", static_large=1)
    assert pooled.end[1] == pytest.approx(2.0)


def test_times_vary_as_they_were_measured() -> None:
    rows = [tuple(row) for row in np.eye(400)]
    out = run(rows, [0.0] * 400, gpus=400, large_spread=(0.5, 1.0, 3.0))
    took, many = np.unique(np.round(out.end, 6), return_counts=True)
    assert took.tolist() == [5.0, 10.0, 30.0]
    assert many.min() > 100  # equally likely
    assert run(rows, [0.0] * 400, gpus=400, small_spread=(3.0,)).end.tolist() == [10.0] * 400


def test_small_workers_never_take_misses_under_the_published_roles() -> None:
    out = run([A, B], [0.0, 0.0], gpus=2, workers="roles", allocation="static", static_large=1)
    assert out.end.tolist() == [10.0, 20.0]
    assert run([A, B], [0.0, 0.0], gpus=2, workers="pooled").end.tolist() == [10.0, 10.0]


def test_admission_refuses_what_would_be_late_and_counts_it_as_broken() -> None:
    out = run([A, B, (0.0, 0.0, 1.0)], [0.0, 0.0, 0.0], admit=True)
    report = out.report()
    # SLO 20 s: the second ends at 20, the third would end at 30.
    assert report["requests"] == {"submitted": 3, "done": 2, "failed": 0, "refused": 1, "cancelled": 0, "lost": 0}
    assert report["slo"]["violations_2x"] == pytest.approx(1 / 3, abs=1e-4)
    assert out.retry_s[2] == pytest.approx(10.0)


def test_closed_loop_lets_the_next_arrive_when_one_ends() -> None:
    source = VectorSimilarities(np.eye(4), warm=0, threshold=0.75)
    config = SimConfig(gpus=2, large_s=10.0, small_s=5.0, ladder=LADDER)
    out = simulate(config, source, Load(kind="closed", concurrency=1))
    assert out.arrival.tolist() == [0.0, 10.0, 20.0, 30.0]
    assert out.report()["latency_s"]["p99"] == 10.0


def test_the_cache_keeps_what_the_eviction_of_production_keeps() -> None:
    source = VectorSimilarities(np.eye(12), warm=5, threshold=0.75)
    config = SimConfig(gpus=1, large_s=1.0, small_s=1.0, ladder=LADDER, cache_capacity=4)
    simulation = Simulation(config, source, [float(i) for i in range(7)])
    simulation.run()
    gone = fifo([Held(id=str(i), seq=i) for i in range(12)], 4)
    assert [str(i) for i in range(12) if not simulation.cache.here[i]] == gone


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from(["fifo", "lru", "utility"]),
    st.lists(st.integers(0, 30), min_size=1, max_size=60),
    st.integers(1, 8),
)
def test_whatever_is_used_the_cache_keeps_what_production_would_keep(
    policy: Policy, script: list[int], capacity: int
) -> None:
    # Each number either uses that image, where it is held, or else brings a new one in.
    cache, held, rows = Cache(100, capacity, policy), list[Held](), 0
    for now, number in enumerate(script):
        found = next((h for h in held if h.id == str(number)), None)
        if found is not None:
            cache.used(number, float(now), 5 + number)
            used = replace(found, last_used_s=float(now), utility=found.utility + 5 + number)
            held = [used if h is found else h for h in held]
            continue
        cache.add(rows, float(now))
        rows += 1
        held.append(Held(id=str(rows - 1), seq=rows, created_s=float(now)))
        gone = choose(held, capacity, policy)
        held = [h for h in held if h.id not in gone]
        assert [str(i) for i in range(100) if cache.here[i]] == sorted((h.id for h in held), key=int)


def test_large_only_admission_keeps_refined_images_out() -> None:
    out = run([A, NEAR_A, NEAR_A], [0.0, 10.0, 20.0], cache_admission="large-only")
    assert out.k.tolist() == [-1, 30, 30]
    both = run([A, NEAR_A, NEAR_A], [0.0, 10.0, 20.0])
    assert both.k.tolist() == [-1, 30, 30]


def test_degradation_lowers_the_threshold_and_is_reported() -> None:
    rng = np.random.default_rng(0)
    source = VectorSimilarities(rng.normal(size=(400, 8)), warm=50, threshold=0.6)
    config = SimConfig(
        gpus=2, large_s=60.0, small_s=11.0, ladder=parse(".95:30,.90:25,.85:15,.80:10,.75:5"), workers="pooled-roles",
        allocation="slo", degrade=True, period_s=60.0,
    )  # fmt: skip
    report = simulate(config, source, Load(kind="poisson", rate_per_min=12.0)).report()
    assert report["degraded_time"] > 0.5
    assert report["requests"]["lost"] == 0


def test_statistical_source_gives_the_hit_rate_and_shares_asked_for() -> None:
    source = statistical(20_000, hit_rate=0.6, k_share="30:3,15:1", ladder=LADDER, seed=1)
    config = SimConfig(gpus=100, large_s=60.0, small_s=11.0, ladder=LADDER, cache_capacity=10)
    report = simulate(config, source, Load(kind="poisson", rate_per_min=180.0)).report()
    assert report["hit_rate"] == pytest.approx(0.6, abs=0.02)
    assert report["skipped_steps"]["30"] / report["skipped_steps"]["15"] == pytest.approx(3, rel=0.1)
    assert report["requests"]["done"] == 20_000


def test_bad_input_names_the_field() -> None:
    for call in (
        lambda: VectorSimilarities(np.ones((3,)), warm=0, threshold=0.5),
        lambda: VectorSimilarities(np.zeros((3, 2)), warm=0, threshold=0.5),
        lambda: VectorSimilarities(np.eye(3), warm=3, threshold=0.5),
        lambda: VectorSimilarities(np.eye(3), warm=0, threshold=0.5, image=np.eye(2)),
        lambda: StatisticalSimilarities(3, hit_rate=2.0, shares=[(0.9, 1.0)], seed=0),
        lambda: statistical(3, hit_rate=0.5, k_share="7:1", ladder=LADDER, seed=0),
        lambda: statistical(3, hit_rate=0.5, k_share="x", ladder=LADDER, seed=0),
        lambda: check(SimConfig(gpus=1, large_s=1.0, small_s=1.0, ladder=LADDER, allocation="best")),
        lambda: check(SimConfig(gpus=0, large_s=1.0, small_s=1.0, ladder=LADDER)),
        lambda: simulate(
            SimConfig(gpus=1, large_s=1.0, small_s=1.0, ladder=LADDER),
            VectorSimilarities(np.eye(3), warm=1, threshold=0.5),
            Load(kind="burst", num_requests=9),
        ),
    ):
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert caught.value.field


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.sampled_from(["pooled", "roles", "pooled-roles"]),
    st.sampled_from(["static", "modm-quality", "modm-throughput", "slo"]),
    st.sets(st.sampled_from(FEATURES)),
    st.integers(0, 2**16),
    st.booleans(),
    st.booleans(),
)
def test_nothing_is_ever_lost_and_equal_seeds_give_equal_runs(
    gpus: int, workers: Any, allocation: str, features: set[str], seed: int, admit: bool, degrade: bool
) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, 4))
    rows = centres[rng.integers(0, 6, 80)] + 0.2 * rng.normal(size=(80, 4))
    source = VectorSimilarities(rows, warm=8, threshold=0.75)
    config = SimConfig(
        gpus=gpus, large_s=10.0, small_s=3.0, ladder=LADDER, workers=workers, allocation=allocation,
        features=frozenset(features), period_s=30.0, cache_capacity=30, admit=admit, degrade=degrade, wait_bound_s=50.0,
        switch_s=1.0, seed=seed,
    )  # fmt: skip
    load = Load(kind="poisson", rate_per_min=8.0 * gpus, seed=seed)
    first, second = simulate(config, source, load), simulate(config, source, load)
    report = first.report()
    assert report == second.report()
    assert report["requests"]["lost"] == 0
    assert report["requests"]["done"] + report["requests"]["refused"] == 72
    done = first.status == 1
    assert (first.start[done] >= first.arrival[done]).all()
    assert (first.end[done] >= first.start[done]).all()
    for worker in range(gpus):
        mine = np.flatnonzero(done & (first.worker == worker))
        order = mine[np.argsort(first.start[mine])]
        assert (first.start[order[1:]] >= first.end[order[:-1]] - 1e-6).all(), "a worker drew two images at once"
    minutes = first.per_minute()
    assert sum(m["served"] for m in minutes) == report["requests"]["done"]
    assert sum(m["offered"] for m in minutes) == 72
