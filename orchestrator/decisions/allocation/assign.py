"""Which worker gets which role, so that few move."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from modm_tasks.queues import Role


def assign_roles(
    workers: Sequence[str], n_large: int, current: Mapping[str, Role], busy: Collection[str] = ()
) -> dict[str, Role]:
    """A role for each of ``workers``, ``n_large`` of them large (bounded to 0..N), with the fewest moves.

    Workers without a role take what is missing first. Then busy ones move before idle ones: a busy worker changes queues
    at no cost while it draws, and the idle ones go on serving the queue that they already watch. Ties go by name.
    """
    wanted = max(0, min(len(workers), n_large))
    names = sorted(workers)
    moving = set(busy)
    large = [w for w in names if current.get(w) == "large"]
    small = [w for w in names if current.get(w) == "small"]
    fresh = [w for w in names if current.get(w) not in {"large", "small"}]
    if len(large) > wanted:
        large = sorted(large, key=lambda w: w not in moving)[len(large) - wanted :]
    elif len(large) < wanted:
        order = fresh + sorted(small, key=lambda w: w not in moving)
        large = large + order[: wanted - len(large)]
    chosen = set(large)
    return {w: "large" if w in chosen else "small" for w in workers}
