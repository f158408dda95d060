"""Routing: the published rules, and each mechanism on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modm_tasks.errors import InvalidInputError
from modm_tasks.messages import Route, SubmitRequest
from modm_tasks.verification import NO_FLOOR, Load, may_escalate
from orchestrator.decisions import routing
from orchestrator.decisions.ladder import PUBLISHED, Ladder, Rung, parse
from orchestrator.decisions.routing import Found, RouteInput, Unfinished
from orchestrator.explain import waited_s


def given(policy: str = "modm", features: str = "", request: dict[str, Any] | None = None, **more: Any) -> RouteInput:
    return RouteInput(
        request=SubmitRequest(prompt="a red cube", **(request or {})),
        policy=policy,
        features=routing.features_of(policy, features),
        **({"ladder": PUBLISHED, "total_steps": 50, "large_service_s": 60.0, "small_service_s": 11.0} | more),
    )


FOUND = Found(id="a", uri="a.png", similarity=0.285)


def test_published_rules_hit_miss_and_reason() -> None:
    hit = routing.route(given(found=FOUND))
    assert (hit.route, hit.skipped_steps, hit.source_id) == (Route.SMALL_REFINE, 15, "a")
    assert "0.285" in hit.reason
    miss = routing.route(given(found=Found(id="a", uri="", similarity=0.2)))
    assert miss.route is Route.LARGE_GEN
    assert "0.200 is below 0.250" in miss.reason
    assert routing.route(given()).route is Route.LARGE_GEN


@pytest.mark.parametrize("policy", ["large-only", "small-only"])
def test_comparison_policies_ignore_the_cache(policy: str) -> None:
    decision = routing.route(given(policy, found=FOUND))
    assert decision.source_id is None
    assert decision.route is (Route.LARGE_GEN if policy == "large-only" else Route.SMALL_REFINE)


@pytest.mark.parametrize(
    ("cache", "route"),
    [
        ("auto", Route.SMALL_REFINE),
        ("no-store", Route.SMALL_REFINE),
        ("bypass", Route.LARGE_GEN),
        ("refresh", Route.LARGE_GEN),
    ],
)
def test_cache_modes(cache: str, route: Route) -> None:
    assert routing.route(given(request={"cache": cache}, found=FOUND)).route is route


def test_a_request_may_ask_for_more_similarity_and_other_steps() -> None:
    assert routing.route(given(request={"min_similarity": 0.29}, found=FOUND)).route is Route.LARGE_GEN
    assert routing.route(given(request={"num_inference_steps": 20}, found=FOUND)).skipped_steps == 6
    assert routing.route(given(lowered_rungs=1, found=FOUND)).skipped_steps == 25


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match="modm-plus"):
        routing.check_policy("modm2")
    with pytest.raises(InvalidInputError, match="late-binding"):
        routing.check_features("inflight,typo")
    assert routing.features_of("modm", "") == frozenset()
    assert routing.features_of("modm-plus", "") == frozenset(routing.FEATURES)
    assert routing.features_of("modm", "inflight, drift") == {"inflight", "drift"}


def test_inflight_waits_only_when_switched_on_and_only_for_a_hit() -> None:
    source = Unfinished(id="b", predicted=0.31, ready_in_s=50.0)
    assert routing.route(given(unfinished=source)).waits_on is None
    waits = routing.route(given(features="inflight", unfinished=source))
    assert (waits.waits_on, waits.skipped_steps, waits.predicted_similarity) == ("b", 30, 0.31)
    weak = Unfinished(id="b", predicted=0.2)
    assert routing.route(given(features="inflight", unfinished=weak)).route is Route.LARGE_GEN


def test_inflight_bounds_chains_and_the_time_lost_while_workers_idle() -> None:
    deep = Unfinished(id="b", predicted=0.31, chain_depth=3)
    assert routing.route(given(features="inflight", unfinished=deep, wait_depth=3)).waits_on is None
    assert routing.route(given(features="inflight", unfinished=deep, wait_depth=4)).waits_on == "b"
    # Idle workers: at most 1.5 x 60 s; refining takes 11 * 20/50 = 4.4 s.
    for ready_s, waits in ((85.0, "b"), (86.0, None)):
        late = Unfinished(id="b", predicted=0.31, ready_in_s=ready_s)
        assert routing.route(given(features="inflight", unfinished=late)).waits_on == waits
    queued = Unfinished(id="b", predicted=0.31, ready_in_s=5000.0)
    assert routing.route(given(features="inflight", unfinished=queued, miss_wait_s=5000.0)).waits_on == "b"


def test_a_weak_hit_waits_for_a_better_rung_under_load_only() -> None:
    better = Unfinished(id="b", predicted=0.31, ready_in_s=60.0)
    same = Unfinished(id="b", predicted=0.285, ready_in_s=0.0)
    assert routing.route(given(features="inflight", found=FOUND, unfinished=better)).source_id == "a"
    assert routing.route(given(features="inflight", found=FOUND, unfinished=better, miss_wait_s=30.0)).waits_on == "b"
    assert routing.route(given(features="inflight", found=FOUND, unfinished=same, miss_wait_s=30.0)).source_id == "a"
    far = Unfinished(id="b", predicted=0.31, ready_in_s=500.0)
    assert routing.route(given(features="inflight", found=FOUND, unfinished=far, miss_wait_s=30.0)).source_id == "a"


def test_a_repeat_whose_k_is_bounded_does_not_wait_for_what_would_be_bounded_too() -> None:
    twin = Found(id="a", uri="a.png", similarity=0.33, same_prompt=True)
    again = Unfinished(id="b", predicted=0.33)
    found = routing.route(given("modm-plus", found=twin, unfinished=again, miss_wait_s=30.0))
    assert (found.source_id, found.waits_on, found.skipped_steps) == ("a", None, 25)


def test_what_else_was_asked_for_is_compared_whole() -> None:
    plain = routing.parameters(SubmitRequest(prompt="a", seed=7, deadline_s=3.0, client="c"))
    assert plain == routing.parameters(SubmitRequest(prompt="b")) == ""
    ones = [
        SubmitRequest(prompt="a", size=size, num_inference_steps=steps) for size in (None, "64x64") for steps in (1, 2)
    ]
    assert len({routing.parameters(one) for one in ones}) == 4


def test_exact_repeats() -> None:
    twin = Found(id="a", uri="a.png", similarity=0.33, same_prompt=True, same_seed=True)
    stored = routing.route(given(features="repeats", request={"seed": 7}, found=twin))
    assert (stored.route, stored.source_id) == (Route.STORED, "a")
    unseeded = Found(id="a", uri="a.png", similarity=0.33, same_prompt=True)
    assert routing.route(given(features="repeats", found=unseeded)).skipped_steps == 25
    assert routing.route(given(features="repeats", found=unseeded, repeat_max_k=10)).skipped_steps == 10
    assert routing.route(given(found=unseeded)).skipped_steps == 30
    assert routing.route(given(request={"seed": 7}, found=twin)).route is Route.SMALL_REFINE


def test_order_is_first_come_first_served_unless_deadline_is_on() -> None:
    assert routing.rank(given(), accepted_s=100.0, deadline_s=120.0, service_s=60.0) == 100.0
    plus = given(features="deadline")
    long = routing.rank(plus, accepted_s=100.0, deadline_s=120.0, service_s=60.0)
    short = routing.rank(plus, accepted_s=150.0, deadline_s=120.0, service_s=5.0)
    late = routing.rank(plus, accepted_s=220.0, deadline_s=120.0, service_s=5.0)
    urgent = routing.rank(plus, accepted_s=220.0, deadline_s=10.0, service_s=5.0)
    assert urgent < short < long < late  # the long one ages: what comes 120 s later does not pass it
    assert routing.rank(plus, accepted_s=100.0, deadline_s=0.0, service_s=60.0) == 100.0


def test_sources_are_hastened_by_what_they_save_together() -> None:
    assert routing.hastened(100.0, saved_s=55.0, n_workers=4) == pytest.approx(86.25)
    assert routing.hastened(100.0, saved_s=55.0, n_workers=0) == 45.0


def test_a_hit_carries_the_floor_of_its_rung_where_it_is_to_be_verified() -> None:
    low, high = Rung(min_similarity=0.2, skipped_steps=5, verify_floor=0.31), Rung(min_similarity=0.3, skipped_steps=30)
    more: dict[str, Any] = {"found": FOUND, "ladder": Ladder(rungs=(low, high))}
    assert routing.route(given("modm-plus", **more)).verify_floor == 0.31
    assert routing.route(given("modm", **more)).verify_floor is None
    assert (
        routing.route(given("modm-plus", **more, lowered_rungs=1)).verify_floor == NO_FLOOR
    )  # of the rung it is on now
    assert routing.route(given("modm", "drift", **more)).verify_floor is None


def test_a_second_drawing_needs_a_low_score_time_and_budget() -> None:
    calm = Load(hits=100, escalated=0, slo_s=120, age_s=20, large_s=60)
    assert may_escalate(0.2, 0.25, calm, rate=0.1)
    assert not may_escalate(0.25, 0.25, calm, rate=0.1)
    assert not may_escalate(0.2, 0.25, replace(calm, escalated=10), rate=0.1)
    assert not may_escalate(0.2, 0.25, replace(calm, age_s=61), rate=0.1)  # it would be late
    assert may_escalate(0.2, 0.25, replace(calm, age_s=1e6, slo_s=0), rate=0.1)  # nothing is known of the times yet
    assert may_escalate(0.2, 0.25, replace(calm, escalated=4, wait_s=60), rate=0.1)
    assert not may_escalate(0.2, 0.25, replace(calm, escalated=5, wait_s=60), rate=0.1)  # half the budget
    assert not may_escalate(0.2, 0.25, replace(calm, wait_s=120), rate=1.0)  # saturated: nothing is bought


def test_a_ladder_predicts_text_to_image_from_text_to_text() -> None:
    assert parse(".9:25").predict(0.8) == 0.8


def test_time_spent_waiting_is_read_from_the_transitions() -> None:
    log = [(10.0, "accepted", ""), (10.5, "waiting", "on a"), (14.0, "queued", ""), (15.0, "running", "")]
    assert waited_s(log, 20.0) == 3.5
    assert waited_s(log[:2], 20.0) == 9.5  # it waits still
    assert waited_s([log[0], *log[2:]], 20.0) is None
