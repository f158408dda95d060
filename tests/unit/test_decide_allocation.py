"""The paper's allocation: equations by hand, the PID against facts D19, roles with few moves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modm_tasks.errors import InvalidInputError
from modm_tasks.queues import Role
from orchestrator.decisions.allocation import paper, pid
from orchestrator.decisions.allocation.assign import assign_roles, become_large
from orchestrator.decisions.allocation.registry import POLICIES, allocate
from orchestrator.decisions.forecast import forecast_per_min
from orchestrator.decisions.snapshot import ClusterSnapshot, PolicyState

FIXED = settings(derandomize=True, deadline=None, max_examples=80)


def snapshot(**more: Any) -> ClusterSnapshot:
    """Large 60 s, small 12 s (P_L = 1, P_S = 5 a minute), 10 workers, all hits at k = 25 (F = 0.5)."""
    base: dict[str, Any] = {
        "now_s": 0.0, "n_workers": 10, "n_large": 10, "large_s": 60.0, "small_s": 12.0, "arrivals_per_min": 10.0,
        "hit_rate": 0.5, "k_histogram": {25: 4},
    }  # fmt: skip
    return ClusterSnapshot(**(base | more))


def test_work_of_a_snapshot() -> None:
    s = snapshot(k_histogram={5: 1, 30: 3})
    # F = (1 * 0.9 + 3 * 0.4) / 4 = 0.525; W_miss = 0.5 * 10; W_hit = 0.5 * 10 * 0.525
    assert s.refine_share == pytest.approx(0.525)
    assert s.miss_per_min == pytest.approx(5.0)
    assert s.hit_work_per_min == pytest.approx(2.625)
    assert snapshot(k_histogram={}).refine_share == 1.0
    assert snapshot(forecast_per_min=20.0).miss_per_min == pytest.approx(10.0)


def test_throughput_mode_by_hand() -> None:
    # Equation 11: W_hit_w = 2.5 * 1/5 = 0.5. Equation 12: 5 / 5.5 * 10 = 9.09 -> 9.
    assert paper.throughput_target(snapshot()) == 9
    # R cancels out.
    assert paper.throughput_target(snapshot(arrivals_per_min=3.0)) == 9
    # H = 0.9: 1 / (1 + 4.5/5) * 10 = 5.26 -> 5
    assert paper.throughput_target(snapshot(hit_rate=0.9)) == 5
    assert paper.throughput_target(snapshot(hit_rate=1.0)) == 1
    assert paper.throughput_target(snapshot(arrivals_per_min=0.0)) == 10


def test_quality_mode_by_hand() -> None:
    # Misses 5/min need 5; n large carry (n - 5) + (10 - n) * 5 >= 2.5 up to n = 10: 5 >= 2.5.
    assert paper.quality_target(snapshot()) == 10
    # R = 16: misses 8, hits 4. n = 9: (9 - 8) + 5 = 6 >= 4; n = 10: 2 < 4. Nine.
    assert paper.quality_target(snapshot(arrivals_per_min=16.0)) == 9
    # R = 24: misses 12 > 10 workers: infeasible, all of them (the paper stays at its start, bounded by N).
    assert paper.quality_target(snapshot(arrivals_per_min=24.0)) == 10


def test_quality_mode_of_the_code_has_headroom_and_breaks_equation_7() -> None:
    # R = 5.2, misses 2.6: 3 * 0.9 carries them, and all ten carry the 1.3 of the hits.
    assert paper.quality_target(snapshot(arrivals_per_min=5.2), "code") == 10
    # R = 12, misses 6 start at 6: 5.4 < 6 is infeasible at the start -> 5 (D20); the paper takes its 10.
    assert paper.quality_target(snapshot(arrivals_per_min=12.0), "code") == 5
    assert paper.quality_target(snapshot(arrivals_per_min=12.0), "paper") == 10


def test_pid_first_steps_by_hand() -> None:
    # 16 -> 4: e = -12, I = -36, D = -12/3 = -4: 0.6*-12 + 0.05*-36 + 0.05*-4 = -9.2 -> 6.8
    one = pid.step(PolicyState(current=16.0), 4, 16)
    assert one.current == pytest.approx(6.8)
    # e = -2.8, I = -44.4, D = (-2.8 + 12) / 3: -1.68 - 2.22 + 0.15333 = -3.74667 -> 3.05333
    two = pid.step(one, 4, 16)
    assert two.current == pytest.approx(3.053333, abs=1e-6)


def test_pid_overshoots_to_one_at_step_four_and_needs_about_ten_periods() -> None:
    # H such that equation 12 asks for 4 of 16: 3 (1 - H) = H * 0.5 * 16.5 / 91.5.
    hit = 3 / (3 + 0.5 * 16.5 / 91.5)
    s = snapshot(n_workers=16, n_large=16, large_s=91.5, small_s=16.5, arrivals_per_min=90.0, hit_rate=hit)
    assert paper.throughput_target(s) == 4
    state: PolicyState | None = None
    large, exact = [], []
    for _ in range(14):
        choice, state = allocate("modm-throughput", s, state)
        large.append(choice.n_large)
        exact.append(state.current or 0.0)
    assert large[:4] == [7, 3, 2, 1]
    assert large[9:] == [4] * 5
    within = [abs(value - 4) <= 1 for value in exact]
    assert within.index(True, 4) == 8  # the ninth period; it passed 3.05 on its way down to 1.35
    assert all(within[8:])


def test_pid_up_from_four_overshoots_to_all_sixteen() -> None:
    s = snapshot(n_workers=16, n_large=4, hit_rate=0.0)
    state, seen = PolicyState(current=4.0), []
    for _ in range(12):
        state = pid.step(state, 14, 16)
        assert state.current is not None
        seen.append(pid.workers(state.current, s.n_workers))
    assert seen.count(16) >= 4


def test_the_registry_names_its_policies_and_survives_what_it_does_not_know() -> None:
    with pytest.raises(InvalidInputError, match="modm-quality"):
        allocate("best", snapshot())
    for policy in POLICIES:
        empty, _ = allocate(policy, snapshot(n_workers=0))
        assert empty.n_large == 0
    unknown, _ = allocate("slo", snapshot(large_s=0.0, n_large=4))
    assert unknown.n_large == 4
    static, _ = allocate("static", snapshot(static_large=3))
    assert static.n_large == 3
    kept, _ = allocate("modm-quality", snapshot(arrivals_per_min=0.0, n_large=6), variant="code")
    assert kept.n_large == 6


def test_state_survives_json() -> None:
    _, state = allocate("modm-throughput", snapshot())
    assert PolicyState.from_json(state.to_json()) == state
    assert PolicyState.from_json({"unknown": 1, "current": 3.0}).current == 3.0
    assert PolicyState.from_json(None) == PolicyState()


SNAPSHOTS = st.builds(
    snapshot,
    n_workers=st.integers(1, 40),
    n_large=st.integers(0, 40),
    arrivals_per_min=st.floats(0, 500),
    hit_rate=st.floats(0, 1),
    k_histogram=st.dictionaries(st.sampled_from([5, 10, 15, 25, 30]), st.floats(0, 50), max_size=5),
    backlog_large_s=st.floats(0, 1e5),
    backlog_small_s=st.floats(0, 1e5),
    oldest_large_s=st.floats(0, 1e4),
    slo_s=st.sampled_from([0.0, 30.0, 120.0]),
    pooled=st.booleans(),
    switch_s=st.floats(0, 60),
)


@FIXED
@given(SNAPSHOTS, st.sampled_from(POLICIES), st.sampled_from(["paper", "code"]))
def test_every_policy_stays_in_range_for_ever(s: ClusterSnapshot, policy: str, variant: Any) -> None:
    state = None
    for _ in range(4):
        choice, state = allocate(policy, s, state, variant=variant)
        assert (0 if policy == "static" else 1) <= choice.n_large <= s.n_workers
        assert choice.reason


@FIXED
@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(2, 30))
def test_throughput_mode_wants_fewer_large_the_more_hits(a: float, b: float, n: int) -> None:
    low, high = sorted((a, b))
    assert paper.throughput_target(snapshot(hit_rate=high, n_workers=n)) <= paper.throughput_target(
        snapshot(hit_rate=low, n_workers=n)
    )


@FIXED
@given(st.lists(st.sampled_from(["large", "small", None]), min_size=1, max_size=12), st.integers(-1, 14), st.data())
def test_roles_are_as_many_as_asked_with_the_fewest_moves(now: list[Role | None], wanted: int, data: Any) -> None:
    workers = [f"w{i}" for i in range(len(now))]
    current: dict[str, Role] = {w: role for w, role in zip(workers, now, strict=True) if role}
    busy = data.draw(st.dictionaries(st.sampled_from(workers), st.floats(0, 90)))
    roles = assign_roles(workers, wanted, current, busy)
    bounded = max(0, min(len(workers), wanted))
    assert list(roles) == workers
    assert sum(r == "large" for r in roles.values()) == bounded
    moved = [w for w in current if roles[w] != current[w]]
    have = sum(r == "large" for r in current.values())
    fresh = len(workers) - len(current)
    assert len(moved) == max(0, have - bounded, bounded - have - fresh)
    busy_kept = [w for w in current if w in busy and w not in moved and current[w] in {current[m] for m in moved}]
    if any(m not in busy for m in moved):
        assert not busy_kept, "an idle worker moved before a busy one"
    if busy_kept and moved:
        assert max(busy[m] for m in moved) <= min(busy[w] for w in busy_kept), "one that is free later moved first"
    assert assign_roles(workers, wanted, current, busy) == roles


def test_the_faster_device_becomes_large_and_stays_it() -> None:
    took = {"a": 60.0, "b": 20.0, "c": 60.0, "d": 20.0}
    none: dict[str, Role] = {}
    assert become_large(["a", "b", "c", "d"], none, large_s=took) == ["b", "d", "a", "c"]
    now: dict[str, Role] = {"a": "large", "b": "small", "c": "large", "d": "small"}
    # Nobody moves without need; then the fast ones come first, and the slow ones leave first, the busy one before.
    assert become_large(list("abcd"), now, {"a": 1.0}, took) == ["c", "a", "b", "d"]
    assert become_large(list("abcd"), now, {"d": 1.0}, took) == ["c", "a", "d", "b"]
    turned: dict[str, Role] = {"a": "large", "b": "large", "c": "small", "d": "small"}
    assert assign_roles(list("abcd"), 1, turned, {"b": 1.0}, took) == {
        "a": "small",
        "b": "large",
        "c": "small",
        "d": "small",
    }


def test_the_busy_worker_that_is_free_first_moves_first_in_both_directions() -> None:
    ends = {"a": 40.0, "b": 3.0, "c": 20.0}
    large: dict[str, Role] = dict.fromkeys("abcd", "large")
    assert assign_roles(list("abcd"), 3, large, ends)["b"] == "small"
    assert assign_roles(list("abcd"), 2, large, ends) == {"a": "large", "b": "small", "c": "small", "d": "large"}
    small: dict[str, Role] = dict.fromkeys("abcd", "small")
    assert become_large(list("abcd"), small, ends) == ["b", "c", "a", "d"]


def test_forecast_follows_a_clear_trend_within_bounds_and_ignores_noise() -> None:
    assert forecast_per_min([], bucket_s=10, ahead_s=90) == 0.0
    assert forecast_per_min([3, 2, 4, 3, 3, 2], bucket_s=10, ahead_s=90) == pytest.approx(17 / 6 * 6)
    rising = [float(i) for i in range(18)]
    # slope 1 a bucket: 8.5 in the mean, 8.5 more at the end, 9 more 90 s later = 26, bounded to twice the mean.
    assert forecast_per_min(rising, bucket_s=10, ahead_s=90) == pytest.approx(2 * 8.5 * 6)
    assert forecast_per_min(rising[::-1], bucket_s=10, ahead_s=90) == pytest.approx(8.5 / 2 * 6)
    steps = [forecast_per_min(rising, bucket_s=10, ahead_s=a) for a in (0, 10, 30)]
    assert all(x <= y for x, y in pairwise(steps))
