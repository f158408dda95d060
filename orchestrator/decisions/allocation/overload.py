"""Overload: give up quality step by step within the floors, then refuse new work for as long as it takes. Pure.

The steps in order: the hit threshold down a rung at a time (which also skips more steps at equal similarity), then fewer
steps for large images, then a faster small model where there is one. One step at a time, each undone after a calm spell,
so that a load at the edge does not make the quality flicker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.decisions.snapshot import ClusterSnapshot, PolicyState

#: Overload begins where more than this share of the requests is predicted to break its SLO ...
TROUBLE_SHARE = 0.05
#: ... and a step is undone after CALM_PERIODS without it and a load below CALM_LOAD of the workers.
CALM_LOAD, CALM_PERIODS = 0.8, 2


@dataclass(frozen=True, kw_only=True)
class Level:
    """What one step of degradation means. ``threshold_rungs`` is relative to the ladder, ``large_steps`` absolute."""

    threshold_rungs: int
    large_steps: int
    faster_small: bool
    name: str


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The outcome: level in force, seconds of refusal (0 = none) and the reason in words."""

    degradation: int
    refuse_s: float
    note: str


def levels(
    *, threshold_rungs: int, floor_steps: int, total_steps: int, faster_small: bool = False
) -> tuple[Level, ...]:
    """All levels within the floors; index 0 is full quality."""
    found = [Level(threshold_rungs=0, large_steps=total_steps, faster_small=False, name="full quality")]
    for rung in range(1, threshold_rungs + 1):
        found.append(replace(found[-1], threshold_rungs=rung, name=f"hit threshold down {rung}"))
    if floor_steps < total_steps:
        found.append(replace(found[-1], large_steps=floor_steps, name=f"{floor_steps} steps for large images"))
    if faster_small:
        found.append(replace(found[-1], faster_small=True, name="faster small model"))
    return tuple(found)


def levels_of(s: ClusterSnapshot) -> tuple[Level, ...]:
    return levels(
        threshold_rungs=s.floor_threshold_rungs,
        floor_steps=s.floor_steps,
        total_steps=s.total_steps,
        faster_small=s.faster_small_s is not None,
    )


def utilisation(s: ClusterSnapshot) -> float:
    """Offered work over all workers, each class at its own model's speed."""
    work = s.miss_per_min * s.large_s + s.hit_work_per_min * s.small_s
    return work / 60 / s.n_workers


def predicted_wait_s(backlog_s: float, running_s: float, n_workers: int) -> float:
    """Seconds until a request that is queued now starts, with all of ``n_workers`` on the work before it."""
    return (backlog_s + running_s) / max(1, n_workers)


@dataclass(frozen=True, kw_only=True)
class ClassLoad:
    """One class of work: workers that prefer it, GPU seconds queued and running there, workers that its arrivals need."""

    workers: int
    work_s: float
    arriving: float = 0.0


def pooled_wait_s(mine: ClassLoad, other: ClassLoad) -> float:
    """Wait of a request of class ``mine`` where roles differ by order only.

    Its own workers alone serve it until the other class's queue is empty; from then on the others help, but for what
    arrives of their own class meanwhile.
    """
    if other.workers <= 0:
        return mine.work_s / max(1, mine.workers)
    drained_s = other.work_s / max(0.25 * other.workers, other.workers - other.arriving)
    served = mine.workers * drained_s
    if mine.workers > 0 and served >= mine.work_s:
        return mine.work_s / mine.workers
    helping = max(0.0, other.workers - other.arriving)
    return drained_s + (mine.work_s - served) / max(0.5, mine.workers + helping)


def admit(*, wait_s: float, service_s: float, slo_s: float) -> float:
    """Admission of one request: 0 = take it, else the Retry-After in seconds.

    It would miss its SLO by ``wait + service - slo``; when that much of the backlog is gone, and nothing else is taken
    before, it would not. So the answer is truthful as long as the workers stay.
    """
    late = wait_s + service_s - slo_s
    return max(1.0, late) if late > 0 else 0.0


def decide(s: ClusterSnapshot, state: PolicyState, *, lost_share: float) -> tuple[Measures, PolicyState]:
    """One step up, down or none; refusal only on the last level. ``lost_share``: predicted breaks over requests."""
    if not s.degrade:
        return Measures(degradation=0, refuse_s=0.0, note=""), replace(state, degradation=0, calm_since_s=None)
    ladder = levels_of(s)
    level = min(state.degradation, len(ladder) - 1)
    if lost_share > TROUBLE_SHARE:
        state = replace(state, calm_since_s=None)
        if level < len(ladder) - 1:
            note = f"; degrades to '{ladder[level + 1].name}': {lost_share:.0%} of the requests would be late"
            state = replace(state, degradation=level + 1, degradation_changed_s=s.now_s)
            return Measures(degradation=level + 1, refuse_s=0.0, note=note), state
        wait_s = predicted_wait_s(s.backlog_large_s + s.backlog_small_s, sum(s.running_s), s.n_workers)
        refuse_s = admit(wait_s=wait_s, service_s=s.large_s, slo_s=s.slo_s or 2 * s.large_s)
        note = f"; refuses for {refuse_s:.0f} s: {wait_s:.0f} s of work wait and no quality is left to give up"
        return Measures(degradation=level, refuse_s=refuse_s, note=note if refuse_s else ""), state
    if level == 0 or utilisation(s) > CALM_LOAD:
        return Measures(degradation=level, refuse_s=0.0, note=""), replace(state, calm_since_s=None)
    since = s.now_s if state.calm_since_s is None else state.calm_since_s
    if s.now_s - since < CALM_PERIODS * s.period_s:
        return Measures(degradation=level, refuse_s=0.0, note=""), replace(state, calm_since_s=since)
    note = f"; back to '{ladder[level - 1].name}': calm for {s.now_s - since:.0f} s"
    state = replace(state, degradation=level - 1, degradation_changed_s=s.now_s, calm_since_s=s.now_s)
    return Measures(degradation=level - 1, refuse_s=0.0, note=note), state
