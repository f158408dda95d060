"""What a simulated run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from modm_tasks.settings import CacheSettings
from orchestrator.decisions.allocation.paper import Variant
from orchestrator.decisions.ladder import Ladder
from vector_store.eviction import Policy

#: pooled: both models resident everywhere, first come first served over both queues. roles: the paper's, moved by the
#: allocation policy. pooled-roles: roles that differ by the order of the queues only.
WorkersMode = Literal["pooled", "roles", "pooled-roles"]


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """``large_s`` and ``small_s``: seconds of a full image on one GPU, ``.._fixed_s`` the part of it that is no step.

    ``overhead_s`` comes to every image; ``front_s`` passes from an arrival until the request is routed, ``claim_s`` until
    an idle worker takes it, ``gap_s`` until a worker that has just ended one does. ``alone_share``: drawing time of the
    only busy worker over that when all are busy, as they may share a machine; linear in the busy ones in between.
    ``.._spread``: equally likely factors of a worker's time for one image; empty = always the same.

    ``turnaround_s``: seconds after which a user of the closed loop sends the next request.
    ``admit``: refuse at arrival what would be late.
    """

    gpus: int
    large_s: float
    small_s: float
    ladder: Ladder
    policy: str = "modm"
    features: frozenset[str] = field(default_factory=frozenset)
    workers: WorkersMode = "pooled"
    allocation: str = "slo"
    variant: Variant = "paper"
    static_large: int = 1
    total_steps: int = 50
    large_fixed_s: float = 0.0
    small_fixed_s: float = 0.0
    overhead_s: float = 0.0
    front_s: float = 0.0
    claim_s: float = 0.0
    gap_s: float = 0.0
    alone_share: float = 1.0
    large_spread: tuple[float, ...] = ()
    small_spread: tuple[float, ...] = ()
    turnaround_s: float = 0.0
    cache_capacity: int = 10_000
    cache_eviction: Policy = "fifo"
    cache_admission: Literal["all", "large-only"] = "all"
    period_s: float = 180.0
    window_s: float = 180.0
    bucket_s: float = 10.0
    min_dwell_s: float = 20.0
    switch_s: float = 0.0
    slo_multiple: float = 2.0
    admit: bool = False
    degrade: bool = False
    floor_threshold_rungs: int = 1
    floor_steps: int = 30
    faster_small_s: float | None = None
    wait_bound_s: float = 600.0
    wait_bound_from_turn: bool = True
    wait_depth: int = 8
    max_depth: int = CacheSettings().max_depth
    repeat_max_k: int = 25
    verify_share: float = 0.05
    escalation_rate: float = 0.1
    seed: int = 42

    @property
    def slo_s(self) -> float:
        return self.slo_multiple * self.large_s
