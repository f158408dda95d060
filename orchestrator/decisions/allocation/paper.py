"""The paper's targets for the number of large workers: throughput mode and quality mode (section 5.3, equations 6-12).

Paper and reference code differ; ``variant`` picks:

| | paper | code |
|---|---|---|
| usable throughput in quality mode | all of it | 0.9 of it |
| quality mode not feasible at ceil(W_miss / P_L) | stay there, bounded by N | one fewer (breaks equation 7, facts D20) |
| and then | serve on | the reference stops the system; here it serves on in both |
| no arrival in the window | decide all the same | keep the allocation: the reference ticks on arrivals only |
"""

from __future__ import annotations

import math
from typing import Literal

from orchestrator.decisions.snapshot import ClusterSnapshot

Variant = Literal["paper", "code"]
CODE_HEADROOM = 0.9
_TINY = 1e-9


def throughput_target(s: ClusterSnapshot) -> int:
    """Equations 11 and 12: workers in proportion to the work of misses and hits, in 1..N. R cancels out.

    N, the all-large allocation, where nothing is known or nothing arrives.
    """
    miss = s.miss_per_min
    hit = s.hit_work_per_min * s.small_s / s.large_s  # times P_L / P_S
    if miss + hit <= 0:
        return s.n_workers
    return max(1, min(s.n_workers, round(miss / (hit + miss) * s.n_workers)))


def quality_target(s: ClusterSnapshot, variant: Variant = "paper") -> int:
    """Equations 6-10: the most large workers that still carry all misses, and all hits together with the small ones.

    A large worker without a miss refines hits with the large model, at the large model's speed (equation 9).
    """
    per_large, per_small = 60 / s.large_s, 60 / s.small_s
    usable = CODE_HEADROOM if variant == "code" else 1.0
    miss, hit = s.miss_per_min, s.hit_work_per_min

    def feasible(n: int) -> bool:
        large, small = n * per_large * usable, (s.n_workers - n) * per_small * usable
        return large >= miss - _TINY and large - miss + small >= hit - _TINY

    start = max(1, math.ceil(miss / per_large - _TINY))
    n = start
    while n <= s.n_workers and feasible(n):
        n += 1
    if n > start:
        return n - 1
    return max(1, min(s.n_workers, start - 1 if variant == "code" else start))
