"""What the rate controller sees and what it decides: frozen, serialisable, without a clock of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class WorkerSpeed:
    """What a full T-step image costs on one worker, seconds."""

    worker: str
    device: str
    large_s: float
    small_s: float


@dataclass(frozen=True, kw_only=True)
class ClusterSnapshot:
    """One look at the cluster. Times in seconds, rates per minute.

    ``large_s`` and ``small_s`` are seconds of a full T-step image on one worker (where ``speeds`` differ, on one of the mean
    rate); 60 / them are P_L and P_S of the paper's equations. ``speeds``: of every worker, in the order in which they become
    large; empty = all alike. ``k_histogram`` counts the hits of the window by skipped steps. Work in the queues comes in
    requests and in predicted GPU seconds (hits at the small model's speed). ``slo_s``: the mean deadline of what came; 0 =
    two large images. ``since_move_s`` holds, by worker, how long it has its role. ``latency_s`` and ``late_share``: mean
    latency and share over the SLO of what ended in the window; told, but no policy goes by it, since it looks back by a
    whole latency.
    """

    now_s: float
    n_workers: int
    n_large: int
    large_s: float
    small_s: float
    total_steps: int = 50
    arrivals_per_min: float = 0.0
    forecast_per_min: float | None = None
    hit_rate: float = 0.0
    k_histogram: Mapping[int, float] = field(default_factory=dict)
    backlog_large: int = 0
    backlog_small: int = 0
    backlog_large_s: float = 0.0
    backlog_small_s: float = 0.0
    running_s: tuple[float, ...] = ()
    slo_s: float = 0.0
    oldest_large_s: float = 0.0
    oldest_small_s: float = 0.0
    latency_s: float | None = None
    late_share: float | None = None
    since_move_s: Mapping[str, float] = field(default_factory=dict)
    min_dwell_s: float = 0.0
    switch_s: float = 0.0
    period_s: float = 180.0
    pooled: bool = False
    static_large: int = 1
    degrade: bool = False
    floor_threshold_rungs: int = 1
    floor_steps: int = 30
    faster_small_s: float | None = None
    speeds: tuple[WorkerSpeed, ...] = ()

    @property
    def rate_per_min(self) -> float:
        """The load to plan for: the forecast where there is one."""
        return self.arrivals_per_min if self.forecast_per_min is None else self.forecast_per_min

    @property
    def refine_share(self) -> float:
        """F = sum of P(k) (1 - k/T): the part of a full image that the average hit runs. 1 without any hit yet."""
        total = sum(self.k_histogram.values())
        if total <= 0:
            return 1.0
        return sum(n * (1 - k / self.total_steps) for k, n in self.k_histogram.items()) / total

    @property
    def miss_per_min(self) -> float:
        """W_miss = (1 - H) R, in full images per minute (equation 7)."""
        return (1 - self.hit_rate) * self.rate_per_min

    @property
    def hit_work_per_min(self) -> float:
        """W_hit = H R F, in full images per minute (equation 8)."""
        return self.hit_rate * self.rate_per_min * self.refine_share

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One allocation that was considered: predicted SLO breaks (requests over the horizon) and quality (0..1)."""

    n_large: int
    breaks: float
    quality: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The decision. ``refuse_s`` > 0: take no new work for that long, a truthful Retry-After."""

    n_large: int
    reason: str
    target: int | None = None
    candidates: tuple[Candidate, ...] = ()
    degradation: int = 0
    refuse_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PolicyState:
    """What a policy remembers between decisions; the controller keeps it as JSON in Redis.

    ``current`` is the PID's own, unrounded number of large workers; None = no decision yet. ``wish``: the direction in which
    `slo` has wanted to move since ``wish_since_s``, 0 = none.
    """

    current: float | None = None
    integral: float = 0.0
    last_error: float = 0.0
    changed_s: float = float("-inf")
    degradation: int = 0
    degradation_changed_s: float = float("-inf")
    calm_since_s: float | None = None
    wish: int = 0
    wish_since_s: float = float("-inf")

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON does not have."""
        return {k: v for k, v in asdict(self).items() if v not in {None, float("-inf")}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> PolicyState:
        """Unknown fields of an older or newer release are ignored: the state is only a memory aid."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in (data or {}).items() if k in known})
