"""From the queues that are to those that should be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modm_tasks.cluster import DesiredRole
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE, Mode, Role
from orchestrator.controller.plan import (
    OFFER_EVERY_S,
    OFFER_S,
    Step,
    offered,
    plan,
    role_queues,
    target_queues,
)

L, S = LARGE_GEN, SMALL_REFINE
NAMES = "abcd"
ordered = st.permutations(NAMES).flatmap(lambda p: st.integers(0, len(NAMES)).map(lambda n: tuple(p[:n])))


def commands(steps: list[Step]) -> list[str]:
    return [f"{s.action} {s.queue}" for s in steps]


@pytest.mark.parametrize(
    ("actual", "desired", "expected"),
    [
        ((L, S), (L, S), []),
        ((L, S), (S,), ["cancel large-gen"]),  # published: large becomes small
        ((S,), (L, S), ["add large-gen", "cancel small-refine", "add small-refine"]),  # and back: misses come first
        ((L, S), (S, L), ["cancel large-gen", "add large-gen"]),  # pooled: order only
        ((S, L), (L, S), ["cancel small-refine", "add small-refine"]),
        ((), (L, S), ["add large-gen", "add small-refine"]),  # a worker that lost its queues
        ((L,), (S,), ["add small-refine", "cancel large-gen"]),  # add before cancel
        ((L, S), (), ["cancel large-gen", "cancel small-refine"]),  # drained
    ],
)
def test_steps_of_every_role_change(actual: tuple[str, ...], desired: tuple[str, ...], expected: list[str]) -> None:
    assert commands(plan(actual, desired)) == expected


def replay(actual: tuple[str, ...], steps: list[Step]) -> list[tuple[str, ...]]:
    """What a worker would show after each command: cancel removes, add appends."""
    current, seen = list(actual), []
    for step in steps:
        if step.action == "add":
            assert step.queue not in current
            current.append(step.queue)
        else:
            current.remove(step.queue)
        seen.append(tuple(current))
    return seen


@given(ordered, ordered)
def test_a_plan_leads_there_and_never_leaves_a_worker_without_work(
    actual: tuple[str, ...], desired: tuple[str, ...]
) -> None:
    steps = plan(actual, desired)
    seen = replay(actual, steps)
    assert [s.expect for s in steps] == seen
    assert (seen[-1] if seen else actual) == desired
    assert bool(steps) == (actual != desired)
    if actual and desired:
        assert all(seen)


def test_a_plan_has_the_fewest_commands() -> None:
    def shortest(actual: tuple[str, ...], desired: tuple[str, ...]) -> int:
        """Breadth-first over all commands."""
        level, known = {actual}, {actual}
        for depth in itertools.count():
            if desired in level:
                return depth
            after = {(*now, q) for now in level for q in "abc" if q not in now}
            after |= {tuple(x for x in now if x != q) for now in level for q in now}
            level, known = after - known, known | after
        raise AssertionError

    lists = [p for n in range(4) for p in itertools.permutations("abc", n)]
    for actual, desired in itertools.product(lists, lists):
        assert len(plan(actual, desired)) == shortest(actual, desired), (actual, desired)


def test_direct_queues_do_not_count() -> None:
    assert role_queues(["gpu0@host.dq2", S, "celery", L]) == (S, L)


@pytest.mark.parametrize(
    ("mode", "role", "expected"),
    [
        ("roles", "large", (L, S)),
        ("roles", "small", (S,)),
        ("pooled", "large", (L, S)),
        ("pooled", "small", (S, L)),
    ],
)
def test_targets_by_mode_and_role(mode: Mode, role: Role, expected: tuple[str, ...]) -> None:
    wanted = DesiredRole(role=role)
    assert target_queues(wanted, mode, unwell_s=None) == expected
    assert target_queues(wanted.model_copy(update={"drained": True}), mode, unwell_s=None) == ()


def test_an_unwell_worker_gets_nothing_but_is_offered_work_now_and_then() -> None:
    wanted = DesiredRole(role="small")
    assert target_queues(wanted, "roles", unwell_s=0.0) == ()
    assert target_queues(wanted, "roles", unwell_s=OFFER_EVERY_S - OFFER_S) == (S,)
    assert target_queues(wanted, "roles", unwell_s=OFFER_EVERY_S) == ()
    share = sum(offered(t / 10) for t in range(int(OFFER_EVERY_S * 10))) / (OFFER_EVERY_S * 10)
    assert share == pytest.approx(OFFER_S / OFFER_EVERY_S, abs=0.01)
