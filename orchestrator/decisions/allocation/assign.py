"""Which worker gets which role, so that few move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from modm_tasks.queues import Role


def become_large(
    workers: Sequence[str],
    current: Mapping[str, Role],
    ends_in_s: Mapping[str, float] | None = None,
    large_s: Mapping[str, float] | None = None,
) -> list[str]:
    """The order in which workers become large: when n are, they are the first n of it.

    Those that are large stay before others come; workers without a role come before small ones. ``large_s``: seconds of a
    large image on each; the faster one becomes or stays large. ``ends_in_s``: seconds until each busy worker is free. Among
    equally fast ones busy ones move before idle ones: a busy worker changes queues at no cost while it draws, and the idle
    ones go on serving the queue that they already watch. The one that is free first moves first, as the first task of its
    new role begins then. Ties go by name.
    """
    took, ends = large_s or {}, ends_in_s or {}

    def joins(worker: str) -> tuple[float, float, str]:
        return took.get(worker, 0.0), ends.get(worker, inf), worker

    def leaves(worker: str) -> tuple[float, float, str]:
        return -took.get(worker, 0.0), ends.get(worker, inf), worker

    large = sorted((w for w in workers if current.get(w) == "large"), key=leaves, reverse=True)
    fresh = sorted((w for w in workers if current.get(w) not in {"large", "small"}), key=joins)
    small = sorted((w for w in workers if current.get(w) == "small"), key=joins)
    return large + fresh + small


def assign_roles(
    workers: Sequence[str],
    n_large: int,
    current: Mapping[str, Role],
    ends_in_s: Mapping[str, float] | None = None,
    large_s: Mapping[str, float] | None = None,
) -> dict[str, Role]:
    """A role for each of ``workers``, ``n_large`` of them large (bounded to 0..N), with the fewest moves."""
    chosen = set(become_large(workers, current, ends_in_s, large_s)[: max(0, n_large)])
    return {w: "large" if w in chosen else "small" for w in workers}
