"""The interface of a vector store. `tests/integration/test_store_backends.py` is the contract of every backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vector_store.embedder import Vector

Quantisation = Literal["none", "int8", "binary"]

#: Payload fields that may stand in a filter, with their kind. Others are not indexed, and a filter on one scans it all.
INDEXED: dict[str, Literal["integer", "keyword"]] = {
    "seq": "integer",
    "depth": "integer",
    "client": "keyword",
    "size": "keyword",
}

#: How many points are taken by codes and scored again with the exact vectors to find the nearest one. Set by recall@1 on
#: real MiniLM vectors (decision record 0010): int8 .973 at 1, .997 at 2, 1.0 at 4; binary .970 at 64, .993 at 128 and 256,
#: 1.0 at 512.
CANDIDATES: dict[Quantisation, int] = {"int8": 4, "binary": 512}
#: Points looked at for each wanted one, at least.
AT_LEAST = 4.0

#: ``auto``: exact up to the first size, int8 up to the second, binary above (decision record 0010).
EXACT_UP_TO, INT8_UP_TO = 2_000, 50_000


def codes_for(setting: Literal["auto", "none", "int8", "binary"], capacity: int) -> Quantisation:
    """Which codes a collection of at most ``capacity`` points gets."""
    if setting != "auto":
        return setting
    return "none" if capacity <= EXACT_UP_TO else "int8" if capacity <= INT8_UP_TO else "binary"


def oversampling(codes: Quantisation, limit: int) -> float:
    """How many times ``limit`` is taken by codes. Not in proportion: who wants a dozen results wants the nearest
    and something to choose from, and a dozen times 512 candidates would be most of a small collection.
    """
    return max(AT_LEAST, CANDIDATES[codes] / limit)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A vector with its payload. ``vector`` is None where it was not asked for; ``id`` is a UUID."""

    id: str
    payload: Mapping[str, Any]
    vector: Vector | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A search result. ``score`` is the exact cosine, also under quantisation."""

    id: str
    score: float
    payload: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """All conditions hold together. Fields are those of INDEXED."""

    equals: Mapping[str, str | int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    not_ids: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.equals or self.at_most or self.not_ids)


class VectorBackend(Protocol):
    """Collections of points under cosine. Thread-safe.

    Unknown collections raise NotFoundError, vectors of another dimension InvalidInputError, a store that does not
    answer UnavailableError. ``shared`` says that other processes may write at the same time. A write has been
    acknowledged by the store when its call returns, and the next read sees it.
    """

    shared: bool

    def collections(self) -> list[str]: ...

    def create(self, collection: str, dim: int) -> None:
        """Make it, with the payload indexes. Nothing happens where it exists; ConflictError if with another dim."""
        ...

    def dim(self, collection: str) -> int: ...

    def drop(self, collection: str) -> None:
        """Delete it with all points. Nothing happens where there is none."""
        ...

    def upsert(self, collection: str, points: Sequence[Point]) -> None: ...

    def search(self, collection: str, vector: Vector, *, limit: int = 1, where: Filter | None = None) -> list[Scored]:
        """The nearest points, best first."""
        ...

    def search_each(
        self, collection: str, vectors: Sequence[Vector], *, limit: int = 1, where: Filter | None = None
    ) -> list[list[Scored]]:
        """``search`` for several vectors, which costs less than one call for each."""
        ...

    def get(self, collection: str, ids: Sequence[str], *, with_vectors: bool = False) -> list[Point]:
        """Those that exist, in no order."""
        ...

    def scroll(
        self, collection: str, *, where: Filter | None = None, with_vectors: bool = False, only: Sequence[str] = ()
    ) -> Iterator[Point]:
        """All points, by id. ``only`` names the payload fields wanted (none = all). Reads in pages: a point written
        meanwhile may or may not come."""
        ...

    def extremes(self, collection: str, key: str, *, limit: int, largest: bool = False) -> list[Point]:
        """The points with the smallest (or largest) values of an indexed integer, in that order."""
        ...

    def delete(self, collection: str, ids: Sequence[str]) -> None: ...

    def set_payloads(self, collection: str, payloads: Mapping[str, Mapping[str, Any]]) -> None:
        """Merge into the payloads of points, by id; nothing happens to one that is not there."""
        ...

    def count(self, collection: str, where: Filter | None = None) -> int: ...

    def tidy(self, collection: str) -> bool:
        """Reclaim deleted points and build codes, where the store does not do so by itself. May hold the store
        for most of a minute at a million points. True where there was something to do."""
        ...

    def disk_bytes(self) -> int | None:
        """Bytes on this machine's disk; None where they are elsewhere."""
        ...

    def close(self) -> None:
        """Release the store. Nothing else may be called afterwards."""
        ...
