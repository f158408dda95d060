"""Text vectors of open requests, in memory: the sources of in-flight reuse and the candidates of late binding.

A few thousand vectors at most, so one matrix product is faster than a second collection in the store (decision record
0008). It is a view of the ledger: after a restart it is filled again from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

#: ``OpenRequest.rung`` of one that no new image can serve better: it waits on another, or is not bound late.
SETTLED = 1_000

#: Rows looked at for each wanted one before all are: sorting all of some thousand costs as much as a search in the cache.
LOOK_AT = 8


@dataclass(frozen=True, kw_only=True)
class OpenRequest:
    """What a later prompt has to know of an unfinished one. ``rung``: how many its source reaches, 0 = a queued miss."""

    id: str
    namespace: str
    size: str | None
    client: str
    order: float
    chain_depth: int = 0
    is_miss: bool = True
    rung: int = SETTLED
    prompt: str = ""
    seed: int | None = None


class OpenRequests:
    """Thread-safe. Vectors are unit length, [dim] float32."""

    def __init__(self, dim: int) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, int] = {}
        self._items: list[OpenRequest | None] = []
        self._matrix = np.zeros((64, dim), dtype=np.float32)
        self._rungs = np.full(64, SETTLED)
        self._free: list[int] = list(range(63, -1, -1))

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, item: OpenRequest, vector: Vector) -> None:
        with self._lock:
            row = self._rows.get(item.id)
            if row is None:
                if not self._free:
                    grown = np.zeros((2 * len(self._matrix), self._matrix.shape[1]), dtype=np.float32)
                    grown[: len(self._matrix)] = self._matrix
                    self._free = list(range(len(grown) - 1, len(self._matrix) - 1, -1))
                    self._matrix = grown
                    self._rungs = np.concatenate([self._rungs, np.full(len(self._rungs), SETTLED)])
                row = self._free.pop()
                self._rows[item.id] = row
            self._items += [None] * (row + 1 - len(self._items))
            self._items[row] = item
            self._matrix[row] = vector
            self._rungs[row] = item.rung

    def remove(self, request_id: str) -> None:
        with self._lock:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self._items[row] = None
                self._matrix[row] = 0.0
                self._rungs[row] = SETTLED
                self._free.append(row)

    def get(self, request_id: str) -> tuple[OpenRequest, Vector] | None:
        with self._lock:
            row = self._rows.get(request_id)
            item = None if row is None else self._items[row]
            return None if row is None or item is None else (item, self._matrix[row].copy())

    def most_similar(
        self, vector: Vector, *, namespace: str, size: str | None, client: str | None, before: float, limit: int = 5
    ) -> list[tuple[OpenRequest, float]]:
        """Earlier open requests by text-to-text cosine. Only earlier ones, so waiting can never form a cycle."""
        return self._best(
            vector,
            limit,
            lambda i: (
                i.namespace == namespace
                and i.size == size
                and i.order < before
                and (client is None or i.client == client)
            ),
        )

    def better_by(
        self, image_vector: Vector, *, thresholds: Sequence[float], namespace: str, size: str | None,
        client: str | None, limit: int = 50,
    ) -> list[tuple[OpenRequest, float]]:  # fmt: skip
        """Queued requests whose *text* reaches a higher rung with this *image* than with what they are bound to now, most
        similar first (late binding). ``thresholds`` are the ladder's, rising."""
        with self._lock:
            n = len(self._items)
            scores = self._matrix[:n] @ image_vector
            rows = np.flatnonzero(np.searchsorted(thresholds, scores, side="right") > self._rungs[:n])
            return self._first(
                scores,
                rows,
                limit,
                lambda i: i.namespace == namespace and i.size == size and (client is None or i.client == client),
            )

    def _best(
        self, vector: Vector, limit: int, accept: Callable[[OpenRequest], bool]
    ) -> list[tuple[OpenRequest, float]]:
        with self._lock:
            if not self._rows:
                return []
            n = len(self._items)
            scores = self._matrix[:n] @ vector
            few = min(n, LOOK_AT * limit)
            found = self._first(scores, np.argpartition(-scores, few - 1)[:few], limit, accept)
            if len(found) < limit and few < n:  # most of the nearest are of other clients, sizes or namespaces
                found = self._first(scores, np.arange(n), limit, accept)
            return found

    def _first(
        self, scores: Vector, rows: NDArray[np.intp], limit: int, accept: Callable[[OpenRequest], bool]
    ) -> list[tuple[OpenRequest, float]]:
        out: list[tuple[OpenRequest, float]] = []
        for row in rows[np.argsort(-scores[rows])]:
            item = self._items[row]
            if item is not None and accept(item):
                out.append((item, max(0.0, float(scores[row]))))
                if len(out) == limit:
                    break
        return out

    def keep_only(self, ids: Iterable[str]) -> None:
        """Drop what the ledger says is no longer open."""
        alive = set(ids)
        for gone in [i for i in list(self._rows) if i not in alive]:
            self.remove(gone)
