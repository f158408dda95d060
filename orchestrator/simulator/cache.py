"""The simulated image cache: which rows are in it, and which leave when it is full, in production's order."""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush

from vector_store.eviction import Held, Policy, order


class Cache:
    """``here[row]`` is 1 while the row's image is in. An entry of the heap counts while it is the row's latest."""

    def __init__(self, rows: int, capacity: int, policy: Policy) -> None:
        self.here = bytearray(rows)
        self._capacity, self._policy = capacity, policy
        self._held: dict[int, Held] = {}
        self._seq = 0
        self._heap: list[tuple[tuple[float, int, str], int]] = []

    def add(self, row: int, now_s: float) -> None:
        """A new image, of which one leaves where there are too many."""
        self.here[row] = 1
        self._seq += 1
        self._keep(row, Held(id=str(row), seq=self._seq, created_s=now_s))
        while len(self._held) > self._capacity:
            key, oldest = heappop(self._heap)
            if oldest in self._held and order(self._held[oldest], self._policy) == key:
                del self._held[oldest]
                self.here[oldest] = 0

    def used(self, row: int, now_s: float, skipped_steps: int) -> None:
        """A request is answered from it. FIFO does not mind."""
        held = self._held.get(row)
        if held is not None and self._policy != "fifo":
            self._keep(row, replace(held, last_used_s=now_s, utility=held.utility + skipped_steps))

    def _keep(self, row: int, held: Held) -> None:
        self._held[row] = held
        heappush(self._heap, (order(held, self._policy), row))
        if len(self._heap) > 4 * self._capacity + 1000:
            self._heap = [(order(h, self._policy), r) for r, h in self._held.items()]
            heapify(self._heap)
