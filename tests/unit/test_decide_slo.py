"""Our allocation and the overload ladder."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.decisions.allocation import overload, slo
from orchestrator.decisions.allocation.registry import allocate
from orchestrator.decisions.snapshot import ClusterSnapshot, PolicyState, WorkerSpeed


def snapshot(**more: Any) -> ClusterSnapshot:
    """MI210: 91.5 and 16.5 s, 16 workers, hits at k = 25, SLO 183 s."""
    base: dict[str, Any] = {
        "now_s": 0.0, "n_workers": 16, "n_large": 16, "large_s": 91.5, "small_s": 16.5, "arrivals_per_min": 9.0,
        "hit_rate": 0.5, "k_histogram": {25: 4}, "slo_s": 183.0, "min_dwell_s": 20.0,
    }  # fmt: skip
    return ClusterSnapshot(**(base | more))


FIXED = settings(derandomize=True, deadline=None, max_examples=80)

#: 2.3 misses a minute need 3.5 workers, 80 hits of 8.25 s need 11: only 4 large leave enough small ones.
STEP = {"arrivals_per_min": 82.3, "hit_rate": 80 / 82.3}


def test_a_step_to_four_is_reached_within_two_periods() -> None:
    s, state, seen = snapshot(**STEP), None, []
    for i in range(6):
        choice, state = allocate("slo", replace(s, n_large=seen[-1] if seen else 16, now_s=180.0 * (i + 1)), state)
        seen.append(choice.n_large)
    assert all(abs(n - 4) <= 1 for n in seen[1:]), seen


def test_low_load_buys_quality_and_the_reason_says_so() -> None:
    choice, _ = allocate("slo", snapshot(arrivals_per_min=3.0))
    assert choice.n_large == 16
    assert "large breaks 0.0 of" in choice.reason
    assert [c.n_large for c in choice.candidates][-1] == 16


def test_where_everything_is_late_already_the_most_work_decides() -> None:
    # Two workers, published roles. 100 hits of 0.3 s wait for a minute against an SLO of 4 s: every candidate breaks them
    # all. In the horizon of 20 s a small worker and an idle large one, a quarter as fast, do 83; two large ones do 33.
    s = ClusterSnapshot(
        now_s=100.0, n_workers=2, n_large=2, large_s=2.0, small_s=0.5, k_histogram={20: 1}, hit_rate=1.0, slo_s=4.0,
        backlog_small=100, backlog_small_s=30.0, oldest_small_s=60.0, period_s=5.0, min_dwell_s=0.0,
    )  # fmt: skip
    assert slo.unserved(s, np.array([1.0, 2.0])) == pytest.approx([100 - 20 * 1.25 / 0.3, 100 - 20 * 0.5 / 0.3])
    choice, _ = allocate("slo", s, PolicyState(changed_s=-100.0))
    assert choice.n_large == 1


def test_breaks_of_a_queue_by_hand() -> None:
    # 100 s of work of 10 s each on one worker, all just arrived, 40 s allowed: what stands behind 40 s is broken: 6 of 10.
    queued = slo.Load(per_s=0.0, service_s=10.0, backlog_s=100.0, oldest_s=0.0, allowed_s=40.0)
    assert slo.breaks(queued, np.array([1.0]), 180.0)[0] == pytest.approx(6.0)
    assert slo.breaks(queued, np.array([4.0]), 180.0)[0] == pytest.approx(0.0)
    # Twice the load that one worker carries: the wait grows by 1 s a second, so after 40 of 100 s it is too long.
    growing = slo.Load(per_s=20.0, service_s=0.1, backlog_s=0.0, oldest_s=0.0, allowed_s=40.0)
    assert slo.breaks(growing, np.array([1.0]), 100.0)[0] == pytest.approx(2000 * 0.6, rel=0.06)
    steady = slo.Load(per_s=5.0, service_s=0.1, backlog_s=0.0, oldest_s=0.0, allowed_s=40.0)
    assert slo.breaks(steady, np.array([1.0]), 100.0)[0] == pytest.approx(0.0, abs=0.1)
    hopeless = slo.Load(per_s=0.1, service_s=10.0, backlog_s=50.0, oldest_s=0.0, allowed_s=-1.0)
    assert slo.breaks(hopeless, np.array([9.0]), 100.0)[0] == pytest.approx(15.0)


@FIXED
@given(st.floats(0, 1), st.floats(0.1, 50), st.floats(0, 5000), st.floats(0, 300), st.floats(0.1, 300))
def test_more_workers_never_break_more(
    per_s: float, service: float, backlog: float, oldest: float, allowed: float
) -> None:
    load = slo.Load(per_s=per_s, service_s=service, backlog_s=backlog, oldest_s=min(oldest, allowed), allowed_s=allowed)
    lost = slo.breaks(load, np.arange(0.0, 20.0), 180.0)
    assert (np.diff(lost) <= 1e-6 + 2e-3 * (per_s * 180 + backlog / service)).all()
    assert (lost >= 0).all()
    assert (lost <= per_s * 180 + backlog / service + 1e-6).all()


@FIXED
@given(st.floats(0, 400), st.floats(0, 400), st.floats(0, 1))
def test_the_floor_grows_with_the_misses(a: float, b: float, hit_rate: float) -> None:
    low, high = sorted((a, b))
    assert slo.need_large(snapshot(arrivals_per_min=low, hit_rate=hit_rate)) <= slo.need_large(
        snapshot(arrivals_per_min=high, hit_rate=hit_rate)
    )


@FIXED
@given(st.floats(0, 60), st.floats(0, 1), st.integers(1, 16), st.booleans(), st.floats(0, 2000), st.floats(0, 2000))
def test_the_floor_always_holds(
    rate: float, hit_rate: float, now: int, pooled: bool, large: float, small: float
) -> None:
    s = snapshot(
        arrivals_per_min=rate, hit_rate=hit_rate, n_large=now, pooled=pooled, backlog_large_s=large, backlog_small_s=small,
    )  # fmt: skip
    choice, _ = allocate("slo", s, PolicyState(changed_s=-5.0))
    assert slo.need_large(s) <= choice.n_large <= 16


#: Three workers: 20, 60 and 60 s a large image (3 + 1 + 1 a minute, 36 s in the mean), 5, 5 and 10 s a small one (30 a
#: minute, 6 s in the mean).
MIXED = snapshot(
    n_workers=3, n_large=1, large_s=36.0, small_s=6.0, slo_s=120.0, hit_rate=0.5,
    speeds=tuple(
        WorkerSpeed(worker=name, device=name, large_s=large, small_s=small)
        for name, large, small in (("a", 20.0, 5.0), ("b", 60.0, 5.0), ("c", 60.0, 10.0))
    ),
)  # fmt: skip


def test_workers_of_different_speed_count_by_their_rates() -> None:
    large, small = slo.units(MIXED)
    # In workers of the mean: large 36/20, 36/60, 36/60; what is left for small: 6/5 + 6/5 + 6/10, less what became large.
    assert large == pytest.approx([0.0, 1.8, 2.4, 3.0])
    assert small == pytest.approx([3.0, 1.8, 0.6, 0.0])
    # 2.9 misses a minute need 1.74 mean workers: the fast one carries them. Two alike would have been needed.
    busy = replace(MIXED, arrivals_per_min=5.8, k_histogram={25: 1})
    assert slo.need_large(busy) == 1
    assert slo.need_large(replace(busy, speeds=())) == 2
    assert slo.need_large(replace(busy, arrivals_per_min=6.2)) == 2
    # 40 a minute are 12 + 6 mean workers' work where there are 3: the misses' share is 2, the fast one and not yet two.
    assert slo.need_large(replace(busy, arrivals_per_min=40.0, small_s=36.0, k_histogram={25: 1})) == 1


def test_with_equal_speeds_nothing_changes() -> None:
    alike = tuple(WorkerSpeed(worker=f"w{i}", device="d", large_s=91.5, small_s=16.5) for i in range(16))
    for rate in (3.0, 9.0, 30.0, 82.3):
        s = snapshot(arrivals_per_min=rate, n_large=9)
        assert allocate("slo", replace(s, speeds=alike))[0].n_large == allocate("slo", s)[0].n_large


def test_dwell_and_hysteresis_hold_small_changes_back() -> None:
    s = snapshot(**STEP, n_large=8, now_s=100.0)
    held, _ = allocate("slo", s, PolicyState(changed_s=90.0))
    assert held.n_large == 8
    assert "dwell" in held.reason
    near = snapshot(arrivals_per_min=3.0, n_large=15)
    stays, _ = allocate("slo", near)
    assert stays.n_large == 15
    assert "stays" in stays.reason


def test_a_thousand_workers_are_decided_within_ten_milliseconds() -> None:
    s = snapshot(n_workers=1000, n_large=500, arrivals_per_min=600.0)
    allocate("slo", s)
    took = min(_timed(s) for _ in range(5))
    assert took < 0.01


def test_published_roles_leave_the_hits_a_worker_where_the_misses_would_need_all() -> None:
    # Four A40: 60 s and 10.8 s. 8 a minute, 42.5 % hits at k = 25: misses need 4.6 of 60 s, hits 0.306 of 5.4 s, together
    # more than four, so the misses' share: 4 * 4.6 / 4.906 = 3.75, three. With 3.4 a minute of misses the four would do, but
    # no whole number carries both: 4 large leave hits 0.6 * 10.8 / 60 = 0.108 of the 0.306 workers, 3 carry no 3.4.
    s = snapshot(n_workers=4, n_large=4, large_s=60.0, small_s=10.8, slo_s=120.0, arrivals_per_min=8.0, hit_rate=0.425)
    assert slo.need_large(s) == 3
    tight = replace(s, arrivals_per_min=6.8, hit_rate=0.5)
    assert sum(load.workers for load in slo.loads(tight)) == pytest.approx(3.4 + 0.306)
    assert slo.need_large(tight) == 3
    choice, _ = allocate("slo", tight, PolicyState(changed_s=-1e6))
    assert choice.n_large == 3


def test_pooled_small_workers_keep_room_for_hits_and_misses_half_of_their_need() -> None:
    # 22 a minute, half of them hits of 8.25 s: misses need 16.775 of 16 workers, hits 1.5125. The misses' share is
    # 16 * 16.775 / 18.2875 = 14.7, fourteen, half of that seven; hits have 1.5 + 2 sqrt(1.5) = 3.97 workers, so 12 at most.
    s = snapshot(arrivals_per_min=22.0, pooled=True)
    assert (slo.need_large(s), slo.most_large(s)) == (7, 12)
    assert slo.most_large(replace(s, pooled=False)) == 16
    assert allocate("slo", s, PolicyState(changed_s=-1e6))[0].n_large == 12
    assert slo.most_large(replace(s, hit_rate=0.0)) == 15  # the first hit finds a worker that prefers it


@FIXED
@given(st.floats(0, 60), st.floats(0, 1), st.integers(1, 16), st.integers(1, 16))
def test_pooled_hits_always_have_their_room_or_the_misses_their_floor(
    rate: float, hit_rate: float, now: int, workers: int
) -> None:
    s = snapshot(arrivals_per_min=rate, hit_rate=hit_rate, n_large=min(now, workers), n_workers=workers, pooled=True)
    choice, _ = allocate("slo", s, PolicyState(changed_s=-1e6))
    hits = slo.loads(s)[1].workers
    assert choice.n_large == slo.need_large(s) or workers - choice.n_large >= hits + 2 * hits**0.5 - 1e-9


def test_what_hysteresis_holds_back_is_done_when_it_stood_for_three_periods() -> None:
    # The light load after a peak: a second large worker of two saves nothing and is the better quality.
    s = snapshot(n_workers=2, n_large=1, arrivals_per_min=0.05, period_s=60.0)
    state, seen = PolicyState(), []
    for i in range(5):
        choice, state = allocate("slo", replace(s, now_s=60.0 * i), state)
        seen.append(choice.n_large)
    assert seen == [1, 1, 1, 2, 2]
    # One decision that does not want it begins the wait anew: nearly all hits, which need the small worker.
    hits = replace(s, arrivals_per_min=8.0, hit_rate=0.98)
    state, seen = PolicyState(), []
    for i, now in enumerate([s, s, hits, s, s, s, s]):
        choice, state = allocate("slo", replace(now, now_s=60.0 * i), state)
        seen.append(choice.n_large)
    assert seen == [1, 1, 1, 1, 1, 1, 2]


def _timed(s: ClusterSnapshot) -> float:
    began = time.process_time()
    allocate("slo", s)
    return time.process_time() - began


HEAVY = snapshot(arrivals_per_min=40.0, degrade=True, backlog_large_s=9000.0, backlog_large=98, period_s=60.0)


def test_overload_goes_down_one_step_at_a_time_then_refuses_and_tells_the_truth() -> None:
    levels = overload.levels_of(HEAVY)
    assert [level.name for level in levels] == ["full quality", "hit threshold down 1", "30 steps for large images"]
    state, seen = PolicyState(), []
    for i in range(4):
        choice, state = allocate("slo", replace(HEAVY, now_s=60.0 * i), state)
        seen.append((choice.degradation, choice.refuse_s > 0))
    assert seen == [(1, False), (2, False), (2, True), (2, True)]
    # 9000 s over 16 workers wait 562.5 s; with 91.5 s of drawing that is 471 s beyond 183 s.
    assert choice.refuse_s == pytest.approx(562.5 + 91.5 - 183.0)
    assert "no quality is left" in choice.reason


def test_overload_is_undone_step_by_step_after_a_calm_spell() -> None:
    calm = replace(HEAVY, arrivals_per_min=3.0, backlog_large_s=0.0, backlog_large=0)
    state, seen = PolicyState(degradation=2), []
    for i in range(7):
        choice, state = allocate("slo", replace(calm, now_s=60.0 * i), state)
        seen.append(choice.degradation)
    assert seen == [2, 2, 1, 1, 0, 0, 0]
    busy = replace(calm, arrivals_per_min=16.0)
    kept, _ = allocate("slo", busy, PolicyState(degradation=1, calm_since_s=-1e6))
    assert kept.degradation == 1


def test_without_leave_nothing_is_degraded_or_refused() -> None:
    choice, state = allocate("slo", replace(HEAVY, degrade=False), PolicyState(degradation=2))
    assert (choice.degradation, choice.refuse_s, state.degradation) == (0, 0.0, 0)


@FIXED
@given(st.integers(0, 4), st.integers(1, 50), st.booleans())
def test_no_level_goes_below_the_floors(rungs: int, steps: int, faster: bool) -> None:
    for level in overload.levels(threshold_rungs=rungs, floor_steps=steps, total_steps=50, faster_small=faster):
        assert level.threshold_rungs <= rungs
        assert steps <= level.large_steps <= 50


def test_admission_and_pooled_waits_by_hand() -> None:
    assert overload.admit(wait_s=100.0, service_s=60.0, slo_s=170.0) == 0.0
    assert overload.admit(wait_s=100.0, service_s=60.0, slo_s=120.0) == 40.0
    miss = overload.ClassLoad(workers=4, work_s=400.0)
    hit = overload.ClassLoad(workers=4, work_s=40.0)
    # The hits' workers are free after 10 s; until then 4 workers do 40 s of the 400, then 8 do the rest: 10 + 45.
    assert overload.pooled_wait_s(miss, hit) == pytest.approx(55.0)
    assert overload.pooled_wait_s(hit, miss) == pytest.approx(10.0)
    assert overload.pooled_wait_s(miss, overload.ClassLoad(workers=0, work_s=40.0)) == pytest.approx(100.0)
