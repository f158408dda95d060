"""The embedded engine: Qdrant's own segments inside this process, one folder per collection, no server.

Measured by `ops/benchmarks/search.py` (docs/performance.md): exact search some 1 ms at 10,000 x 768. Field measurements on
a like machine: 14 ms at 100,000, with int8 codes and rescoring 3 ms, with binary ones 1.2 ms. Where it breaks:
one process only, every call holds the GIL for its whole time, so a long one stops every thread; building HNSW would
for minutes, so it is off.
"""

from __future__ import annotations

import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qe

from modm_tasks.errors import ConflictError, InvalidInputError, NotFoundError, UnavailableError
from vector_store.backends.base import INDEXED, Filter, Point, Quantisation, Scored, oversampling
from vector_store.backends.lock import StoreLock
from vector_store.embedder import Vector

#: Points of one call: it holds the GIL, so a bulk load or a walk must leave gaps for the serving threads.
UPSERT_BATCH, SCROLL_BATCH, SCROLL_BATCH_VECTORS = 64, 256, 64
#: Searches of one call, and points that they look at: eight together take half the processor time of eight calls, a bigger
#: batch little less, and in a large collection they would keep the GIL too long.
SEARCH_BATCH, SEARCH_POINTS = 8, 400_000
#: Segments smaller than this are never given codes: scanning them exactly takes a fraction of a millisecond.
_CODES_FROM_KB = 4_000
_CONFIG = "edge_config.json"


class EdgeBackend:
    """See `VectorBackend`. One lock around every call but a search: the engine serialises them by the GIL in any case."""

    shared = False

    def __init__(
        self, folder: Path, *, quantisation: Quantisation = "none", what: str | None = None, owner: int | None = None
    ) -> None:
        """Take the folder, for the process ``owner``. Raises StoreInUseError that names the process which has it."""
        self._folder = folder.absolute()
        self._lock = threading.RLock()
        self._holder = StoreLock(self._folder, what, owner)
        self._quantisation = quantisation
        self._shards: dict[str, qe.EdgeShard] = {}
        self._dims: dict[str, int] = {}

    def collections(self) -> list[str]:
        with self._lock:
            return sorted(p.parent.name for p in self._folder.glob(f"*/{_CONFIG}"))

    def create(self, collection: str, dim: int) -> None:
        with self._lock:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,200}", collection):
                raise InvalidInputError(f"collection name {collection[:80]!r} is not of letters, digits, - and _")
            path = self._folder / collection
            if (path / _CONFIG).is_file():
                if self.dim(collection) != dim:
                    raise ConflictError(f"collection {collection} has dimension {self.dim(collection)}, not {dim}")
                return
            shutil.rmtree(path, ignore_errors=True)  # what a crash in the middle of a creation has left
            path.mkdir(parents=True)
            shard = qe.EdgeShard.create(str(path), self._config(dim))
            for key, kind in INDEXED.items():
                schema = qe.PayloadSchemaType.Integer if kind == "integer" else qe.PayloadSchemaType.Keyword
                shard.update(qe.UpdateOperation.create_field_index(key, schema))
            self._dims[collection], self._shards[collection] = dim, shard

    def dim(self, collection: str) -> int:
        with self._lock:
            self._shard(collection)
            return self._dims[collection]

    def drop(self, collection: str) -> None:
        with self._lock:
            shard = self._shards.pop(collection, None)
            self._dims.pop(collection, None)
            if shard is not None:
                shard.close()
            path = self._folder / collection
            (path / _CONFIG).unlink(missing_ok=True)  # first: from here on it does not exist, however this ends
            shutil.rmtree(path, ignore_errors=True)

    def upsert(self, collection: str, points: Sequence[Point]) -> None:
        for start in range(0, len(points), UPSERT_BATCH):
            batch = [_to_point(p) for p in points[start : start + UPSERT_BATCH]]
            self._update(collection, qe.UpdateOperation.upsert_points(batch))

    def search(self, collection: str, vector: Vector, *, limit: int = 1, where: Filter | None = None) -> list[Scored]:
        return self.search_each(collection, [vector], limit=limit, where=where)[0]

    def search_each(
        self, collection: str, vectors: Sequence[Vector], *, limit: int = 1, where: Filter | None = None
    ) -> list[list[Scored]]:
        # Opened first: only then is its dimension known.
        shard = self._shards.get(collection) or self._shard(collection)
        for vector in vectors:
            self._check_dim(collection, len(vector))
        requests = [
            qe.QueryRequest(
                limit=limit,
                query=qe.Query.Nearest(np.asarray(vector, dtype=np.float32).tolist()),
                filter=_to_filter(where),
                with_payload=True,
                params=self._search_params(limit),
            )
            for vector in vectors
        ]
        together = _together(shard)
        out: list[list[Scored]] = []
        for start in range(0, len(requests), together):
            out += self._query(collection, requests[start : start + together])
        return out

    def _query(self, collection: str, requests: list[qe.QueryRequest]) -> list[list[Scored]]:
        shard = self._shards.get(collection) or self._shard(collection)
        try:
            # Without the lock: the GIL serialises it, and a lock that is free for microseconds between two searches
            # would keep an insert waiting for many of them.
            found = shard.query_batch(qe.QueryBatchRequest(requests))
        except Exception as error:  # the engine raises bare Exception
            if self._shards.get(collection) is shard:
                raise UnavailableError(f"the vector store refused a search: {error}") from error
            return self._query(collection, requests)  # dropped, or made anew, meanwhile
        return [[Scored(id=str(p.id), score=float(p.score), payload=p.payload or {}) for p in one] for one in found]

    def get(self, collection: str, ids: Sequence[str], *, with_vectors: bool = False) -> list[Point]:
        with self._lock:
            found = self._shard(collection).retrieve([*ids], True, with_vectors)
        return [_from_record(r) for r in found]

    def scroll(
        self, collection: str, *, where: Filter | None = None, with_vectors: bool = False, only: Sequence[str] = ()
    ) -> Iterator[Point]:
        offset: Any = None
        while True:
            page, offset = self.page(collection, offset, where=where, with_vectors=with_vectors, only=only)
            yield from page
            if offset is None:
                return

    def page(
        self, collection: str, offset: Any, *, where: Filter | None = None, with_vectors: bool = False,
        only: Sequence[str] = (),
    ) -> tuple[list[Point], Any]:  # fmt: skip
        """One page of `scroll`: (points, offset of the next one; None = it was the last)."""
        payload: Any = qe.PayloadSelector.Include([*only]) if only else True
        batch = SCROLL_BATCH_VECTORS if with_vectors else SCROLL_BATCH
        request = qe.ScrollRequest(
            offset=offset, limit=batch, filter=_to_filter(where), with_payload=payload, with_vector=with_vectors
        )
        with self._lock:
            records, following = self._shard(collection).scroll(request)
        return [_from_record(record) for record in records], following

    def extremes(self, collection: str, key: str, *, limit: int, largest: bool = False) -> list[Point]:
        direction = qe.Direction.Desc if largest else qe.Direction.Asc
        request = qe.ScrollRequest(limit=limit, with_payload=True, order_by=qe.OrderBy(key, direction))
        with self._lock:
            records, _ = self._shard(collection).scroll(request)
        return [_from_record(r) for r in records]

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), SCROLL_BATCH):
            self._update(collection, qe.UpdateOperation.delete_points([*ids[start : start + SCROLL_BATCH]]))

    def set_payloads(self, collection: str, payloads: Mapping[str, Mapping[str, Any]]) -> None:
        with self._lock:
            for record in self._shard(collection).retrieve([*payloads], False, False):
                changed = dict(payloads[str(record.id)])
                self._update(collection, qe.UpdateOperation.set_payload([record.id], changed))

    def count(self, collection: str, where: Filter | None = None) -> int:
        with self._lock:
            return int(self._shard(collection).count(qe.CountRequest(exact=True, filter=_to_filter(where))))

    def tidy(self, collection: str) -> bool:
        with self._lock:
            shard = self._shard(collection)
            try:
                changed = bool(shard.optimize())
            except Exception as error:  # the engine raises bare Exception
                raise UnavailableError(f"the vector store cannot be tidied: {error}") from error
            if changed:
                # The engine keeps the files of the segments that it replaced until the collection is opened again: ten
                # times the collection's size after ten tidyings. A search that meets the closed one waits for the new one.
                del self._shards[collection]
                shard.close()
                self._opened(collection)
            self._warm(collection)
            return changed

    def _warm(self, collection: str) -> None:
        """One exact search, which maps all vectors into memory: with codes every search meets pages of its own for the
        first time, which tripled the p99 of the first hundreds at a million."""
        if self._quantisation == "none":
            return
        anything = [1.0] * self.dim(collection)
        exact = qe.SearchParams(quantization=qe.QuantizationSearchParams(ignore=True))
        self._query(collection, [qe.QueryRequest(limit=1, query=qe.Query.Nearest(anything), params=exact)])

    def disk_bytes(self) -> int:
        """Allocated, not apparent, size: the engine reserves sparse files of 32 MiB for its log."""
        return sum(p.stat().st_blocks * 512 for p in self._folder.rglob("*") if p.is_file())

    def close(self) -> None:
        with self._lock:
            for shard in self._shards.values():
                shard.close()
            self._shards.clear()
            self._holder.release()

    def _shard(self, collection: str) -> qe.EdgeShard:
        with self._lock:
            return self._opened(collection)

    def _opened(self, collection: str) -> qe.EdgeShard:
        shard = self._shards.get(collection)
        if shard is None:
            path = self._folder / collection
            if not (path / _CONFIG).is_file():
                raise NotFoundError(f"no collection {collection}")
            dim = _dim_of(path)
            try:
                shard = qe.EdgeShard.load(str(path), self._config(dim))
            except Exception as error:  # the engine raises bare Exception
                raise UnavailableError(f"collection {collection} cannot be opened: {error}") from error
            self._dims[collection], self._shards[collection] = dim, shard  # in this order: a search takes no lock
        return shard

    def _update(self, collection: str, operation: qe.UpdateOperation) -> None:
        with self._lock:
            shard = self._shard(collection)
            try:
                shard.update(operation)
            except Exception as error:  # the engine raises bare Exception
                if "dimension" in str(error):
                    raise InvalidInputError(str(error), field="vector") from error
                raise UnavailableError(f"the vector store refused a write: {error}") from error

    def _check_dim(self, collection: str, dim: int) -> None:
        if (own := self._dims.get(collection, dim)) != dim:
            raise InvalidInputError(f"vector has {dim} dimensions; collection {collection} has {own}", field="vector")

    def _config(self, dim: int) -> qe.EdgeConfig:
        codes: Any = {
            "none": None,
            "int8": qe.ScalarQuantizationConfig(qe.ScalarType.Int8, quantile=0.99, always_ram=True),
            "binary": qe.BinaryQuantizationConfig(always_ram=True),
        }[self._quantisation]
        return qe.EdgeConfig(
            vectors=qe.EdgeVectorParams(size=dim, distance=qe.Distance.Cosine),
            hnsw_config=qe.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=10),  # m=0: no graph
            quantization_config=codes,
            optimizers=qe.EdgeOptimizersConfig(default_segment_number=1, indexing_threshold=_CODES_FROM_KB),
            # There is one segment with codes: a pool only adds processor time to its search.
            max_search_threads=1,
        )

    def _search_params(self, limit: int) -> qe.SearchParams | None:
        if self._quantisation == "none":
            return None
        codes = qe.QuantizationSearchParams(rescore=True, oversampling=oversampling(self._quantisation, limit))
        return qe.SearchParams(quantization=codes)


def _together(shard: qe.EdgeShard) -> int:
    """How many searches of it are made in one call."""
    try:
        points = shard.info().points_count
    except Exception:  # closed meanwhile; the search itself finds the new one, or says so
        return 1
    return max(1, min(SEARCH_BATCH, SEARCH_POINTS // max(1, points)))


def _dim_of(path: Path) -> int:
    match = re.search(r'"size"\s*:\s*(\d+)', (path / _CONFIG).read_text(encoding="utf-8"))
    if match is None:
        raise UnavailableError(f"{path / _CONFIG} does not state a dimension")
    return int(match[1])


def _to_point(point: Point) -> qe.Point:
    if point.vector is None:
        raise InvalidInputError(f"point {point.id} has no vector", field="vector")
    return qe.Point(point.id, np.asarray(point.vector, dtype=np.float32).tolist(), dict(point.payload))


def _from_record(record: qe.Record) -> Point:
    vector = None if record.vector is None else np.asarray(record.vector, dtype=np.float32)
    return Point(id=str(record.id), payload=record.payload or {}, vector=vector)


def _to_filter(where: Filter | None) -> qe.Filter | None:
    if not where:
        return None
    must: list[Any] = [qe.FieldCondition(k, match=qe.MatchValue(v)) for k, v in where.equals.items()]
    must += [qe.FieldCondition(k, range=qe.RangeFloat(lte=v)) for k, v in where.at_most.items()]
    # The stub says list; the engine takes a set.
    excluded: Any = {uuid.UUID(i) for i in where.not_ids}
    return qe.Filter(must=must or None, must_not=[qe.HasIdCondition(excluded)] if excluded else None)
