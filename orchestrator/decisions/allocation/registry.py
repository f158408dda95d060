"""Allocation policies by name. One call for the controller and the simulator alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modm_tasks.errors import InvalidInputError
from orchestrator.decisions.allocation import paper, pid, slo
from orchestrator.decisions.allocation.paper import Variant
from orchestrator.decisions.snapshot import Allocation, ClusterSnapshot, PolicyState

POLICIES = ("static", "modm-quality", "modm-throughput", "slo")


def allocate(
    policy: str, snapshot: ClusterSnapshot, state: PolicyState | None = None, *, variant: Variant = "paper"
) -> tuple[Allocation, PolicyState]:
    """Decide the number of large workers; keep the returned state for the next call.

    Raises InvalidInputError for an unknown policy. With no worker, or before the models' speeds are known, nothing moves.
    """
    if policy not in POLICIES:
        raise InvalidInputError(f"allocation must be one of {', '.join(POLICIES)}, not {policy!r}", field="allocation")
    state = state or PolicyState()
    if snapshot.n_workers <= 0:
        return Allocation(n_large=0, reason="no worker is ready"), state
    if policy == "static":
        n = max(0, min(snapshot.n_workers, snapshot.static_large))
        return Allocation(n_large=n, reason=f"static: {n} of {snapshot.n_workers}", target=n), state
    if snapshot.large_s <= 0 or snapshot.small_s <= 0:
        n = max(1, min(snapshot.n_workers, snapshot.n_large))
        return Allocation(n_large=n, reason="the models' speeds are not known yet; nothing moves"), state
    if policy == "slo":
        return slo.allocate(snapshot, state)
    if policy == "modm-throughput":
        return _published(snapshot, state, variant, lambda: paper.throughput_target(snapshot), "throughput")
    return _published(snapshot, state, variant, lambda: paper.quality_target(snapshot, variant), "quality")


def _published(
    s: ClusterSnapshot, state: PolicyState, variant: Variant, target_of: Callable[[], int], mode: str
) -> tuple[Allocation, PolicyState]:
    """Target of the equations, approached by the PID."""
    state = replace(state, current=float(s.n_large)) if state.current is None else state
    assert state.current is not None
    if variant == "code" and s.rate_per_min <= 0:
        n = pid.workers(state.current, s.n_workers)
        return Allocation(n_large=n, reason="no arrival in the window; the reference keeps its allocation"), state
    target = target_of()
    after = pid.step(state, target, s.n_workers)
    assert after.current is not None
    n = pid.workers(after.current, s.n_workers)
    reason = (
        f"{mode} mode: misses {s.miss_per_min:.2f}/min, hits {s.hit_work_per_min:.2f}/min of full images ask for {target} "
        f"of {s.n_workers} large; the PID goes from {state.current:.2f} to {after.current:.2f}"
    )
    return Allocation(n_large=n, reason=reason, target=target), after
