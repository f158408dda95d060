"""From raw readings to the snapshot, with numbers worked by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modm_tasks.cluster import Control
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest, WorkerStatus
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE
from modm_tasks.settings import ControllerSettings, Settings, SloSettings, WorkerSettings
from orchestrator.controller import observe, prices
from orchestrator.controller.decide import first_large, kept_share
from orchestrator.controller.observe import Readings, Waiting, snapshot_of
from orchestrator.controller.rules import Rules

SETTINGS = Settings(large_model="big", small_model="little", slo=SloSettings(multiple=2.0))
STEPS = {"big": 0.1, "little": 0.02}  # 5 s and 1 s a full image of 50 steps


def rules(**changes: Any) -> Rules:
    base: dict[str, Any] = {
        "mode": "roles", "allocation": "slo", "variant": "paper", "static_large": 1, "period_s": 20.0, "bucket_s": 10.0
    }  # fmt: skip
    return Rules(**(base | changes))


def record(name: str, *, route: Route, k: int = 0, step: int = 0, steps: int | None = None) -> RequestRecord:
    decision = Decision(route=route, policy="modm", skipped_steps=k)
    request = SubmitRequest(prompt="p", num_inference_steps=steps)
    return RequestRecord(id=name, state=State.RUNNING, request=request, decision=decision, step=step)


def status(
    name: str, *, models: tuple[str, ...] = (), swap_s: dict[str, float] | None = None, **more: Any
) -> WorkerStatus:
    return WorkerStatus(
        worker=name, gpu="0", host="h", pid=1, device="fake", models=models, large_model="big-v1", small_model="little",
        embedder="fake", started_s=0.0, swap_s=swap_s or {}, **more,
    )  # fmt: skip


def buckets(*arrivals: float, **more: float) -> list[dict[str, float]]:
    rows = [{"at_s": 1000.0 + 10 * i, "arrivals": n} for i, n in enumerate(arrivals)]
    rows[-1] |= more
    return rows


def test_rates_and_shares_of_the_window() -> None:
    ended = {"done": 9, "failed": 1, "latency_sum": 25.0, "slo_total": 8, "slo_missed": 2}
    series = buckets(0, 0, 6, 6, hits=6, misses=4, stored=2, **ended, **{"k:0": 1, "k:10": 3, "k:25": 2})
    readings = Readings(now_s=1040.0, series=series, step_s=STEPS)
    s = snapshot_of(readings, rules(allocation="modm-quality"), SETTINGS, members=("a", "b"), n_large=1)
    assert s.arrivals_per_min == pytest.approx(60 * (12 - 2) / 20)  # from the first arrival on, stored answers apart
    assert s.hit_rate == pytest.approx(0.6)
    assert s.k_histogram == {0: 1.0, 10: 3, 25: 2}
    assert s.refine_share == pytest.approx((1 * 1 + 3 * 0.8 + 2 * 0.5) / 6)
    assert (s.large_s, s.small_s, s.slo_s) == (5.0, 1.0, 10.0)
    assert (s.latency_s, s.late_share) == (2.5, 0.25)
    assert s.forecast_per_min is None  # the paper's policies plan for the window that was
    assert (s.n_workers, s.n_large, s.period_s, s.pooled) == (2, 1, 20.0, False)


def test_the_slo_is_the_mean_deadline_of_what_has_come() -> None:
    """Each request has its own or the default; 2 x 5 s is for a window in which none has come."""
    for asked, expected in ({"deadlines": 4, "deadline_sum": 26.0}, 6.5), ({}, 10.0):
        readings = Readings(now_s=1040.0, series=buckets(0, 0, 6, 6, **asked), step_s=STEPS)
        assert snapshot_of(readings, rules(), SETTINGS, members=("a",), n_large=1).slo_s == expected


def test_the_forecast_is_that_of_the_simulator_half_a_period_ahead() -> None:
    # 3, 6, 9, 12 a bucket: mean 7.5, slope 3 a bucket, which is more than 2 sqrt(7.5 / 5) = 2.4. The last whole bucket's
    # middle is 1035 s; half a period of 20 s after 1040 is 1.5 buckets later: 7.5 + 3 (1.5 + 1.5) = 16.5, at most twice 7.5.
    assert observe.forecast(buckets(3, 6, 9, 12), rules(), 1040.0) == pytest.approx(15 * 6)
    # 7, 10, 13, 16: mean 11.5, slope 3 against 2 sqrt(11.5 / 5) = 3.03: noise, so the mean.
    assert observe.forecast(buckets(7, 10, 13, 16), rules(), 1040.0) == pytest.approx(11.5 * 6)
    # 20, 16, 12, 8: mean 14, slope -4 against 3.3: 14 - 4 * 3 = 2, at least half of 14.
    assert observe.forecast(buckets(20, 16, 12, 8), rules(), 1040.0) == pytest.approx(7 * 6)
    assert observe.forecast(buckets(0, 0, 5, 5), rules(), 1040.0) is None  # two buckets are no trend
    assert observe.forecast(buckets(3, 3, 3, 3), rules(), 1035.0) is None  # the last bucket is not whole yet


def test_backlog_in_gpu_seconds() -> None:
    waiting = {
        LARGE_GEN: [Waiting(steps=50, arrival_s=990.0), Waiting(steps=30, arrival_s=995.0)],
        SMALL_REFINE: [Waiting(steps=40, arrival_s=999.0)],
    }
    readings = Readings(now_s=1000.0, step_s=STEPS, waiting=waiting, queued={LARGE_GEN: 4, SMALL_REFINE: 1})
    s = snapshot_of(readings, rules(), SETTINGS, members=("a",), n_large=1)
    assert (s.backlog_large, s.backlog_small) == (4, 1)
    assert s.backlog_large_s == pytest.approx(4 * 40 * 0.1)  # the two that were read stand for all four
    assert s.backlog_small_s == pytest.approx(40 * 0.02)
    assert (s.oldest_large_s, s.oldest_small_s) == (10.0, 1.0)


@pytest.mark.parametrize(("asked", "skipped", "expected"), [(50, 0, 50), (50, 30, 20), (20, 25, 10), (1, 45, 1)])
def test_steps_to_run(asked: int, skipped: int, expected: int) -> None:
    assert observe.steps_to_run(asked, skipped, 50) == expected


def test_running_work_and_when_it_ends() -> None:
    running = [
        record("a", route=Route.LARGE_GEN, step=20),  # 30 steps of 0.1 s
        record("b", route=Route.SMALL_REFINE, k=30, step=15),  # 5 steps of 0.02 s
        record("c", route=Route.LARGE_GEN, steps=10, step=10),
    ]
    readings = Readings(now_s=0.0, running=running, step_s=STEPS)
    assert observe.ends_in_s(readings, SETTINGS, 0.1, 0.02) == pytest.approx({"a": 3.0, "b": 0.1, "c": 0.0})
    assert snapshot_of(readings, rules(), SETTINGS, members=("x",), n_large=1).running_s == pytest.approx(
        (0.0, 0.1, 3.0)
    )


def test_speeds_are_learned_else_profiled_else_unknown() -> None:
    ready = [status("a", models=("big-v1", "little"), swap_s={})]
    prior = {"big": 0.3, "little": 0.04}
    learned = Readings(now_s=0.0, step_s={"big-v1": 0.2}, prior_step_s=prior, ready=ready)
    assert prices.model_step_s(learned, SETTINGS) == (0.2, 0.04)
    assert prices.model_step_s(Readings(now_s=0.0), SETTINGS) == (0.0, 0.0)
    told = SETTINGS.model_copy(update={"slo": SloSettings(large_latency_s=60.0)})
    assert prices.model_step_s(Readings(now_s=0.0), told) == pytest.approx((1.2, 1.2 * 16.5 / 91.5))
    small_only = Readings(now_s=0.0, step_s={"little": 0.0165})
    assert prices.model_step_s(small_only, SETTINGS) == pytest.approx((0.0915, 0.0165))


SWIFT, SLOW = status("a", device_name="swift"), status("b", device_name="slow", profile_step_s={"big-v1": 0.3})
LEARNED = {("big-v1", "swift"): 0.05, ("little", "swift"): 0.01, ("little", "slow"): 0.04}


def test_each_worker_is_priced_by_its_own_device_first() -> None:
    mean = {"big-v1": 0.1, "little": 0.02}
    readings = Readings(
        now_s=0.0, step_s=mean, device_step_s=LEARNED, ready=[SWIFT, SLOW, status("c", device_name="new")]
    )
    assert prices.model_step_s(readings, SETTINGS, SWIFT) == (0.05, 0.01)
    assert prices.model_step_s(readings, SETTINGS, SLOW) == (0.3, 0.04)  # its own profile before the mean of the others
    own = prices.worker_speeds(readings, SETTINGS)
    assert (own["c"].large_s, own["c"].small_s) == (5.0, 1.0)  # nothing known of its device
    s = snapshot_of(readings, rules(), SETTINGS, members=("a", "b"), n_large=1)
    # 2.5 s and 15 s a large image: 24 + 4 a minute, 14 each in the mean, 60 / 14 s. Small: 0.5 s and 2 s, 0.8 s.
    assert (s.large_s, s.small_s) == pytest.approx((60 / 14, 0.8))
    assert [w.worker for w in s.speeds] == ["a", "b"]
    assert observe.inputs(s)["speeds"] == {
        "swift": {"workers": 1, "large_s": 2.5, "small_s": 0.5},
        "slow": {"workers": 1, "large_s": 15.0, "small_s": 2.0},
    }


def test_running_work_ends_by_the_speed_of_its_own_worker() -> None:
    running = [record("a", route=Route.LARGE_GEN, step=20).model_copy(update={"worker": "b"})]
    readings = Readings(now_s=0.0, step_s=STEPS, device_step_s=LEARNED, ready=[SWIFT, SLOW], running=running)
    s = snapshot_of(readings, rules(), SETTINGS, members=("a", "b"), n_large=1)
    assert s.running_s == pytest.approx((30 * 0.3,))


def test_the_fallback_model_is_a_step_once_its_speed_is_known() -> None:
    made = SETTINGS.model_copy(update={"slo": SloSettings(fallback_small_model="swift")})
    assert prices.faster_small_s(Readings(now_s=0.0, step_s=STEPS), made) is None
    profiled = Readings(now_s=0.0, prior_step_s={"swift": 0.01})
    assert prices.faster_small_s(profiled, made) == pytest.approx(0.5)
    learned = Readings(now_s=0.0, step_s={"swift": 0.02}, prior_step_s={"swift": 0.01})
    assert prices.faster_small_s(learned, made) == pytest.approx(1.0)
    assert prices.faster_small_s(learned, SETTINGS) is None


def test_a_switch_costs_what_is_not_resident() -> None:
    both = status("a", models=("big-v1", "little"), swap_s={"big-v1": 9.0})
    one = status("b", models=("little",), swap_s={"big-v1": 12.0, "other": 99.0})
    assert observe.switch_s([both]) == 0.0
    assert observe.switch_s([both, one]) == 12.0


def test_time_in_role_counts_members_only() -> None:
    readings = Readings(now_s=100.0, step_s=STEPS, since_s={"a": 90.0, "gone": 1.0})
    s = snapshot_of(readings, rules(), SETTINGS, members=("a", "b"), n_large=1)
    assert dict(s.since_move_s) == {"a": 10.0}


def test_inputs_are_plain_json() -> None:
    s = snapshot_of(Readings(now_s=1 / 3, step_s=STEPS), rules(), SETTINGS, members=("a",), n_large=1)
    shown = observe.inputs(s)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["now_s"] == 0.3333
    assert observe.plain({"x": float("inf"), 3: (1.23456,)}) == {"x": None, "3": [1.2346]}


def test_control_overrides_the_settings() -> None:
    settings = Settings(
        worker=WorkerSettings(mode="roles"),
        controller=ControllerSettings(allocation="slo", static_large=3, period_s=180),
    )
    assert Rules.of(settings, Control.model_validate({})) == rules(period_s=180.0, static_large=3)
    control = Control(mode="pooled", allocation="static", static_large=0, period_s=5.0, bucket_s=2.0)
    assert Rules.of(settings, control) == rules(
        mode="pooled", allocation="static", static_large=0, period_s=5.0, bucket_s=2.0
    )


@pytest.mark.parametrize(
    ("allocation", "n", "expected"),
    [("modm-quality", 4, 4), ("modm-throughput", 4, 3), ("slo", 1, 1), ("static", 4, 1)],
)
def test_first_allocation_is_the_references(allocation: str, n: int, expected: int) -> None:
    assert first_large(rules(allocation=allocation), n) == expected


@pytest.mark.parametrize(("kept", "n", "expected"), [(2, 4, 2), (3, 2, 2), (1, 1, 1), (0, 4, 0)])
def test_between_periods_the_number_of_large_workers_is_kept(kept: int, n: int, expected: int) -> None:
    assert kept_share(kept, n).n_large == expected
