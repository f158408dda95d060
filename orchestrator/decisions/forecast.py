"""A short forecast of the arrival rate from the window's buckets. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: A trend counts when it stands out of Poisson noise by this many standard errors; else the mean is the forecast.
SIGNIFICANT = 2.0


def forecast_per_min(counts: Sequence[float], *, bucket_s: float, ahead_s: float) -> float:
    """Arrivals per minute ``ahead_s`` after the last bucket, by least squares, within half and twice the mean.

    ``counts``: arrivals of each bucket, oldest first. Breaks at steps: a step shows as a slope, which overshoots for the
    rest of the window, hence the bounds.
    """
    n = len(counts)
    total = sum(counts)
    if n == 0 or total <= 0:
        return 0.0
    mean = total / n
    middle = (n - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(n))
    if n < 4:
        return mean * 60 / bucket_s
    slope = sum((i - middle) * c for i, c in enumerate(counts)) / spread
    if abs(slope) < SIGNIFICANT * math.sqrt(mean / spread):
        return mean * 60 / bucket_s
    at = mean + slope * (middle + ahead_s / bucket_s)
    return min(2 * mean, max(mean / 2, at)) * 60 / bucket_s
