"""How a worker gets from the queues it consumes to those it should. Pure: lists in, steps out.

A worker serves its queues in the order in which they were added (``queue_order_strategy=priority``), and the list that
``active_queues`` reports has that order, so ordered lists are compared, not sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from modm_tasks.cluster import DesiredRole
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE, Mode, queues_of

ROLE_QUEUE_NAMES = frozenset({LARGE_GEN, SMALL_REFINE})

#: An unwell worker is offered work again for the last OFFER_S of every OFFER_EVERY_S: it examines its device when a
#: token arrives, so one that never gets a token could never find out that it is well again.
OFFER_EVERY_S, OFFER_S = 30.0, 5.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One control command, and the ordered role queues that must be seen before the next one is sent."""

    action: Literal["add", "cancel"]
    queue: str
    expect: tuple[str, ...]


def role_queues(names: Iterable[str]) -> tuple[str, ...]:
    """The role queues among what a worker consumes; a direct queue, or one of somebody else's, is not our business."""
    return tuple(name for name in names if name in ROLE_QUEUE_NAMES)


def plan(actual: Sequence[str], desired: Sequence[str]) -> list[Step]:
    """Fewest commands from ``actual`` to ``desired``, both ordered; empty when they are equal.

    An added queue lands at the end, so only a prefix of ``desired`` that stands in ``actual`` in that order can stay;
    what else stands there is cancelled and, if wanted, added again. Queues that are new come first, so that at no time
    a worker consumes nothing, unless nothing is what it should consume.
    """
    kept: list[str] = []
    position = -1
    for queue in desired:
        if queue not in actual or (found := list(actual).index(queue)) <= position:
            break
        kept.append(queue)
        position = found
    rest = list(desired[len(kept) :])
    steps: list[Step] = []
    current = list(actual)

    def do(action: Literal["add", "cancel"], queue: str) -> None:
        current.append(queue) if action == "add" else current.remove(queue)
        steps.append(Step(action=action, queue=queue, expect=tuple(current)))

    while rest and rest[0] not in actual:
        do("add", rest.pop(0))
    for queue in actual:
        if queue not in kept:
            do("cancel", queue)
    for queue in rest:
        do("add", queue)
    return steps


def target_queues(desired: DesiredRole, mode: Mode, *, unwell_s: float | None) -> tuple[str, ...]:
    """What a worker should consume now. ``unwell_s``: for how long it has said that it is unwell; None = it is well."""
    if desired.drained or (unwell_s is not None and not offered(unwell_s)):
        return ()
    return queues_of(mode, desired.role)


def offered(unwell_s: float) -> bool:
    """Whether a worker that has been unwell for so long is offered work just now."""
    return unwell_s % OFFER_EVERY_S >= OFFER_EVERY_S - OFFER_S
