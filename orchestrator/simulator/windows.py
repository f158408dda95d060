"""The controller's windows in virtual time: buckets of counts, as the ledger keeps them in Redis."""

from __future__ import annotations

from collections import Counter, deque

from orchestrator.decisions.forecast import forecast_per_min


class Windows:
    """Arrivals, hits by k and misses of the last ``window_s``."""

    def __init__(self, window_s: float, bucket_s: float) -> None:
        self.window_s, self.bucket_s = window_s, bucket_s
        self._buckets: deque[tuple[int, Counter[str]]] = deque()

    def count(self, now_s: float, name: str) -> None:
        index = int(now_s // self.bucket_s)
        if not self._buckets or self._buckets[-1][0] != index:
            self._buckets.append((index, Counter()))
            self._trim(index)
        self._buckets[-1][1][name] += 1

    def _trim(self, index: int) -> None:
        oldest = index - int(self.window_s // self.bucket_s)
        while self._buckets and self._buckets[0][0] <= oldest:
            self._buckets.popleft()

    def totals(self, now_s: float) -> Counter[str]:
        self._trim(int(now_s // self.bucket_s))
        total: Counter[str] = Counter()
        for _, counts in self._buckets:
            total.update(counts)
        return total

    def rates(self, now_s: float, ahead_s: float) -> tuple[float, float]:
        """(arrivals per minute over the window, forecast). Before the first full window: over the time that passed."""
        total = self.totals(now_s)["arrivals"]
        seen_s = min(self.window_s, max(now_s, self.bucket_s))
        per_min = total / seen_s * 60
        last = int(now_s // self.bucket_s)
        by_index = {index: counts["arrivals"] for index, counts in self._buckets}
        n = int(seen_s // self.bucket_s)
        # The bucket that is being filled would look like a fall in load.
        series = [by_index.get(last - n + i, 0) for i in range(n)]
        return per_min, forecast_per_min(series, bucket_s=self.bucket_s, ahead_s=ahead_s)
