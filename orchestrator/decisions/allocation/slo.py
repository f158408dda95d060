"""Our allocation: try every number of large workers, predict which breaks the fewest SLOs, take the best.

The prediction is closed form, a fluid queue for each class over one horizon (four times the longer of period and SLO):

* misses load ``a_m = rate (1-H) L / 60`` workers, hits ``a_h = rate H S F / 60``; with roles a large worker without a
  miss refines hits at the large model's speed (equation 9), pooled workers help both ways at no loss;
* what is queued is broken from the position on at which its wait exceeds what its age has left of the SLO;
* what arrives at time t is broken with the chance that the queue's work, a reflected Brownian motion from B on with the
  drift of load minus capacity and the variance of Poisson arrivals, exceeds what c workers do in the allowed time.

Workers count by their own speeds where those differ. Nothing is integrated, so nothing winds up: after a step in load the
next decision is the new optimum. Where it breaks: the horizon takes the rates as constant, so a burst shorter than the
window is seen late; the FIFO order within a class is assumed, so slack order does somewhat better than predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.decisions.allocation import overload
from orchestrator.decisions.snapshot import Allocation, Candidate, ClusterSnapshot, PolicyState

Floats = NDArray[np.float64]

#: Breaks within this share of the horizon's requests count as equal; the better quality then decides.
EQUAL_SHARE = 0.005
#: The present allocation stays unless another one saves more than this share of the requests, is further away than
#: STAY_WORKERS or STAY_SHARE of the workers, or has been the better one for PATIENCE periods.
STAY_GAIN, STAY_WORKERS, STAY_SHARE, PATIENCE = 0.02, 1, 0.03, 3
#: Standard deviations of the hits' work that pooled small workers have to spare.
ROOM = 2.0
KEPT_CANDIDATES = 33
NOTHING = 1e-6
HORIZON = 4.0
#: Moments of the horizon at which arrivals are looked at, as shares of it.
MOMENTS = tuple((i + 0.5) / 6 for i in range(6))


@dataclass(frozen=True, kw_only=True)
class Load:
    """Work of one class: requests per second, seconds each, queued GPU seconds, age of the oldest, allowed wait."""

    per_s: float
    service_s: float
    backlog_s: float
    oldest_s: float
    allowed_s: float

    @property
    def workers(self) -> float:
        return self.per_s * self.service_s


def loads(s: ClusterSnapshot) -> tuple[Load, Load]:
    """Misses and hits of a snapshot."""
    hit_s = s.small_s * s.refine_share
    slo_s = s.slo_s or 2 * s.large_s
    per_s = s.rate_per_min / 60
    miss = Load(
        per_s=per_s * (1 - s.hit_rate), service_s=s.large_s, backlog_s=s.backlog_large_s, oldest_s=s.oldest_large_s,
        allowed_s=slo_s - s.large_s,
    )  # fmt: skip
    hit = Load(
        per_s=per_s * s.hit_rate, service_s=hit_s, backlog_s=s.backlog_small_s, oldest_s=s.oldest_small_s,
        allowed_s=slo_s - hit_s,
    )  # fmt: skip
    return miss, hit


def horizon(s: ClusterSnapshot) -> float:
    """Seconds over which breaks are counted: HORIZON times the longer of period and SLO.

    Within one SLO a queue that grows breaks nothing yet, so a shorter look would find an overloaded class harmless.
    """
    return HORIZON * max(s.period_s, s.slo_s or 2 * s.large_s)


def units(s: ClusterSnapshot) -> tuple[Floats, Floats]:
    """For 0..N large workers, what the large and what the small ones are worth, in workers of the mean rate."""
    if not s.speeds:
        n = np.arange(s.n_workers + 1, dtype=np.float64)
        return n, s.n_workers - n
    large = np.array([0.0] + [s.large_s / w.large_s for w in s.speeds])
    small = np.array([0.0] + [s.small_s / w.small_s for w in s.speeds])
    return np.cumsum(large), small.sum() - np.cumsum(small)


def need_large(s: ClusterSnapshot) -> int:
    """The floor: what the misses need; where no number carries both classes, their share of the work.

    Pooled, half of that: the small workers draw misses too when no hit waits, so more of them take nothing from the misses
    but the time that the hits need, and a hit costs a fraction of a miss.
    """
    miss, hit = loads(s)
    worth = units(s)[0]
    everything = np.arange(1, s.n_workers + 1, dtype=np.float64)
    if carries(replace(s, backlog_large_s=0.0, backlog_small_s=0.0), everything).any():
        found = min(s.n_workers, int(np.searchsorted(worth, miss.workers - 1e-9)))
    else:
        share = miss.workers / (miss.workers + hit.workers)
        found = int(np.searchsorted(worth, worth[-1] * share + 1e-9, side="right")) - 1
    return max(1, math.ceil(found / 2) if s.pooled else found)


def capacities(s: ClusterSnapshot, n: Floats, horizon_s: float) -> tuple[Floats, Floats]:
    """Workers that misses and hits have under ``n`` large ones; hits' in workers of the small model's speed."""
    miss, hit = loads(s)
    moved = np.abs(n - s.n_large) * min(1.0, s.switch_s / horizon_s)
    large, small = (worth[n.astype(int)] for worth in units(s))
    large = np.where(n > s.n_large, np.maximum(0.0, large - moved), large)
    small = np.where(n < s.n_large, np.maximum(0.0, small - moved), small)
    idle_large = np.maximum(0.0, large - miss.workers - miss.backlog_s / horizon_s)
    if not s.pooled:
        return large, small + idle_large * (s.small_s / s.large_s)
    idle_small = np.maximum(0.0, small - hit.workers - hit.backlog_s / horizon_s)
    return large + idle_small, small + idle_large


def breaks(load: Load, capacity: Floats, horizon_s: float) -> Floats:
    """Predicted broken SLOs of one class over the horizon, for each capacity (in workers)."""
    arrivals = load.per_s * horizon_s
    queued = load.backlog_s / load.service_s if load.service_s > 0 else 0.0
    if load.allowed_s <= 0:
        return np.full_like(capacity, arrivals + queued)
    c = np.maximum(capacity, 1e-9)
    lost = np.zeros_like(c)
    if queued > NOTHING:
        # At the share f of the queue: wait f B/c plus age (1 - f) oldest, against what is allowed.
        slope, room = load.backlog_s / c - load.oldest_s, load.allowed_s - load.oldest_s
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            at = np.clip(np.where(slope == 0, 0.0, room / slope), 0.0, 1.0)
        share = np.where(slope > 0, 1 - at, np.where(slope < 0, at, float(room < 0)))
        lost = lost + queued * share
    if arrivals > NOTHING:
        lost = lost + arrivals * np.mean([_late(load, c, t * horizon_s) for t in MOMENTS], axis=0)
    return lost


def _late(load: Load, c: Floats, t_s: float) -> Floats:
    """Chance that what arrives at ``t_s`` waits longer than allowed: the queue's work as reflected Brownian motion.

    Drift: load minus capacity; variance: that of Poisson arrivals; from the present backlog. In the work's own units the
    variance does not depend on c, so more workers never make it worse.
    """
    drift, variance = load.workers - c, load.workers * load.service_s
    limit, spread = load.allowed_s * c, math.sqrt(variance * t_s)
    above = np.exp(_log_normal((load.backlog_s - limit + drift * t_s) / spread))
    mirrored = _log_normal((-load.backlog_s - limit - drift * t_s) / spread) + 2 * drift * limit / variance
    return np.asarray(np.minimum(1.0, above + np.exp(np.minimum(0.0, mirrored))))


def _log_normal(x: Floats) -> Floats:
    """Logarithm of the cumulative normal distribution: a logistic approximation (error 2e-4), its asymptote below -5."""
    near, far = np.clip(x, -5.0, 8.0), np.minimum(x, -5.0)
    return np.asarray(
        np.where(
            x > -5.0,
            -np.log1p(np.exp(-1.5976 * near - 0.070566 * near**3)),
            -(far**2) / 2 - np.log(-far) - 0.5 * math.log(2 * math.pi),
        )
    )


def carries(s: ClusterSnapshot, n: Floats) -> NDArray[np.bool_]:
    """Whether both classes' arrivals are carried for good. One that grows slowly breaks nothing within the horizon."""
    miss, hit = loads(s)
    large, small = capacities(s, n, horizon(s))
    return np.asarray((large >= miss.workers - 1e-9) & (small >= hit.workers - 1e-9))


def unserved(s: ClusterSnapshot, n: Floats) -> Floats:
    """Requests of both classes that are left over at the end of the horizon, for each candidate."""
    horizon_s = horizon(s)
    left = np.zeros_like(n)
    for load, capacity in zip(loads(s), capacities(s, n, horizon_s), strict=True):
        if load.service_s > 0:
            work_s = load.backlog_s + (load.workers - capacity) * horizon_s
            left = left + np.maximum(0.0, work_s) / load.service_s
    return left


def most_large(s: ClusterSnapshot) -> int:
    """N; pooled, so many that the small workers, one at least, have ROOM standard deviations of the hits' work to spare.

    Spare small workers draw misses, but a large one takes no hit while a miss waits: where all are large, hits starve as
    soon as the misses fill them.
    """
    if not s.pooled:
        return s.n_workers
    hits = loads(s)[1].workers
    return min(s.n_workers - 1, math.floor(s.n_workers - hits - ROOM * math.sqrt(hits)))


def score(s: ClusterSnapshot) -> tuple[Floats, Floats, Floats]:
    """(n_large, breaks, quality) for every candidate from the floor to `most_large`, arrays of equal length.

    Quality is the share of workers that are large: with roles, idle ones refine hits with the large model.
    """
    horizon_s, least = horizon(s), need_large(s)
    n = np.arange(least, max(least, most_large(s)) + 1, dtype=np.float64)
    miss, hit = loads(s)
    large, small = capacities(s, n, horizon_s)
    lost = breaks(miss, large, horizon_s) + breaks(hit, small, horizon_s)
    return n, lost, n / s.n_workers


def allocate(s: ClusterSnapshot, state: PolicyState) -> tuple[Allocation, PolicyState]:
    """The policy `slo`. See the module's text."""
    n, lost, quality = score(s)
    requests = s.rate_per_min / 60 * horizon(s) + s.backlog_large + s.backlog_small
    sound = carries(s, n)
    if not sound.any():
        sound = np.ones_like(sound)
    # What is left over at the end breaks nothing within the horizon, and is late all the same.
    cost = lost + unserved(s, n)
    near = sound & (cost <= cost[sound].min() + EQUAL_SHARE * requests + 1e-9)
    best = int(np.flatnonzero(near)[np.argmax(quality[near])])
    target = int(n[best])
    chosen, why, state = _held_back(s, state, target, n, cost, requests)
    at = int(np.searchsorted(n, chosen)) if chosen >= n[0] else 0
    changed_s = s.now_s if chosen != s.n_large else state.changed_s
    reason = (
        f"{target} of {s.n_workers} large breaks {lost[best]:.1f} of {requests:.0f} requests "
        f"(now {s.n_large}, floor {int(n[0])}){why}"
    )
    measures, state = overload.decide(s, replace(state, changed_s=changed_s), lost_share=_share(lost[at], requests))
    return (
        Allocation(
            n_large=chosen,
            target=target,
            reason=reason + measures.note,
            candidates=_candidates(n, lost, quality, best),
            degradation=measures.degradation,
            refuse_s=measures.refuse_s,
        ),
        state,
    )


def _share(lost: float, requests: float) -> float:
    return float(lost) / requests if requests > 0 else 0.0


def _held_back(
    s: ClusterSnapshot, state: PolicyState, target: int, n: Floats, cost: Floats, requests: float
) -> tuple[int, str, PolicyState]:
    """Dwell and hysteresis: (the number put into force, why it is not the target, state). The floor always holds.

    A small change that saves little is made when a change in its direction has been the better choice for PATIENCE periods.
    """
    wish = (target > s.n_large) - (target < s.n_large)
    if wish != state.wish:
        state = replace(state, wish=wish, wish_since_s=s.now_s)
    if target == s.n_large or not int(n[0]) <= s.n_large <= int(n[-1]):
        return target, "", state
    if s.now_s - state.changed_s < s.min_dwell_s:
        since = s.now_s - state.changed_s
        return s.n_large, f"; stays: changed {since:.0f} s ago, dwell {s.min_dwell_s:.0f} s", state
    gain = float(cost[int(s.n_large - n[0])] - cost[int(target - n[0])])
    small = abs(target - s.n_large) <= max(STAY_WORKERS, STAY_SHARE * s.n_workers)
    waited_s = s.now_s - state.wish_since_s
    if small and gain <= STAY_GAIN * requests and waited_s < PATIENCE * s.period_s:
        return s.n_large, f"; stays: {target} would save {gain:.1f}, and is wanted for {waited_s:.0f} s", state
    return target, "", state


def _candidates(n: Floats, lost: Floats, quality: Floats, best: int) -> tuple[Candidate, ...]:
    """Those around the best, for the explanation."""
    first = max(0, min(best - KEPT_CANDIDATES // 2, len(n) - KEPT_CANDIDATES))
    rows = range(first, min(len(n), first + KEPT_CANDIDATES))
    return tuple(
        Candidate(n_large=int(n[i]), breaks=round(float(lost[i]), 3), quality=round(float(quality[i]), 3)) for i in rows
    )
