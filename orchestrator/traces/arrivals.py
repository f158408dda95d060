"""When the requests of a trace arrive. Pure and seeded; formulas and their source: facts, section C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from modm_tasks.errors import InvalidInputError

Kind = Literal["recorded", "burst", "poisson", "rising", "fluctuating"]
KINDS: tuple[Kind, ...] = ("recorded", "burst", "poisson", "rising", "fluctuating")
#: Mean of the fluctuating series relative to its peak; see `fluctuating_rate`.
FLUCTUATING_SPAN_MIN = 429.0


def arrival_times(
    kind: str,
    n: int,
    *,
    recorded: Sequence[float | None] | None = None,
    rate_per_min: float | None = None,
    min_rate_per_min: float = 1.0,
    speed: float = 1.0,
    seed: int = 42,
) -> list[float]:
    """Seconds from the start, [n], row for row. Raises InvalidInputError.

    recorded: the trace's own times from its earliest row on, over ``speed``; decreasing where the rows are not in order
    of time (`replay` sends by time). The others never decrease. burst: all at 0. poisson: exponential gaps of mean
    60 / rate. rising: rate climbs by a sigmoid from ``min_rate_per_min`` to ``rate_per_min`` (reference code).
    fluctuating: see below.
    """
    if kind not in KINDS:
        raise InvalidInputError(f"unknown arrivals {kind!r}; there are {', '.join(KINDS)}, closed", field="arrivals")
    if kind == "burst":
        return [0.0] * n
    if kind == "recorded":
        return _recorded(n, recorded, speed)
    if rate_per_min is None or not 0 < rate_per_min <= 1e6:
        raise InvalidInputError(f"arrivals={kind} needs --rate-per-min, above 0", field="rate_per_min")
    rng = np.random.default_rng(seed)
    if kind == "poisson":
        return list(np.cumsum(rng.exponential(60.0 / rate_per_min, n)).tolist())
    if kind == "rising":
        x = np.linspace(-2, 6, n)
        rates = min_rate_per_min + (rate_per_min - min_rate_per_min) / (1 + np.exp(-1.5 * x))
        return list(np.cumsum(60.0 / rates).tolist())
    return _fluctuating(n, rate_per_min, rng)


def _recorded(n: int, recorded: Sequence[float | None] | None, speed: float) -> list[float]:
    if speed <= 0:
        raise InvalidInputError("speed must be above 0", field="speed")
    times = list(recorded or ())[:n]
    if len(times) < n or any(t is None for t in times):
        raise InvalidInputError("this trace has no arrival times; choose other --arrivals", field="arrivals")
    known = np.array([t for t in times if t is not None])
    return list(((known - known.min()) / speed).tolist()) if n else []


def fluctuating_rate(minute: float, peak_per_min: float, phases: Sequence[float]) -> float:
    """Rate at a minute: three waves of 40, 95 and 210 minutes over a floor, between 0 and the peak.

    The paper's figure 17 shows such a load from 0 to 25 per minute over 429 minutes, without its generator (facts C); this
    one is ours.
    """
    waves = ((40.0, 0.25), (95.0, 0.35), (210.0, 0.4))
    total = sum(w * (0.5 + 0.5 * np.sin(2 * np.pi * minute / p + f)) for (p, w), f in zip(waves, phases, strict=True))
    return float(peak_per_min * total)


def _fluctuating(n: int, peak_per_min: float, rng: np.random.Generator) -> list[float]:
    """A Poisson process of that rate, by thinning; the series repeats its shape beyond its span."""
    phases = rng.uniform(0, 2 * np.pi, 3).tolist()
    times: list[float] = []
    at_min = 0.0
    while len(times) < n:
        at_min += float(rng.exponential(1.0 / peak_per_min))
        if rng.random() * peak_per_min < fluctuating_rate(at_min, peak_per_min, phases):
            times.append(at_min * 60.0)
    return times


def jitter(times: Sequence[float], *, seed: int = 42) -> list[float]:
    """Spread equal minute stamps: plus min(Poisson(30), 60) s, then sorted (reference, cache_policy_size.py)."""
    rng = np.random.default_rng(seed)
    moved = np.asarray(times) + np.minimum(rng.poisson(30, len(times)), 60)
    return list(np.sort(moved, kind="stable").tolist())
