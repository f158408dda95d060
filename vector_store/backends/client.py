"""Qdrant through its own client: a server (gRPC), or the client's local mode for tests.

The local mode (``local:DIR``, ``memory:``) is plain NumPy: no codes, no payload index, some 35 ms at 10,000 x 768 and a
second at 100,000, and two threads that write at once corrupt it (qdrant-client #1193), so everything goes through one
lock there. A server takes calls from many threads and processes.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models

from modm_tasks.errors import ConflictError, InvalidInputError, NotFoundError, UnavailableError
from vector_store.backends.base import INDEXED, Filter, Point, Quantisation, Scored, oversampling
from vector_store.backends.lock import StoreLock
from vector_store.embedder import Vector

UPSERT_BATCH, SCROLL_BATCH = 128, 500
TIMEOUT_S = 10


class ClientBackend:
    """See `VectorBackend`. Make it after a fork, one per process: gRPC does not survive one."""

    def __init__(self, url: str, *, api_key: str | None = None, quantisation: Quantisation = "none") -> None:
        """Connect. Raises UnavailableError where no server answers, StoreInUseError for a held ``local:`` folder."""
        self._holder: StoreLock | None = None
        self._quantisation = quantisation
        self._folder: Path | None = None
        self._dims: dict[str, int] = {}
        self.shared = url.startswith("http")
        if self.shared:
            self._client = _connect(url, api_key)
        elif url == "memory:":
            self._client = QdrantClient(":memory:")
        else:
            self._folder = Path(url.removeprefix("local:")).absolute()
            self._holder = StoreLock(self._folder)
            self._client = QdrantClient(path=str(self._folder))
        self._lock: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if self.shared else threading.RLock()
        )

    def collections(self) -> list[str]:
        with self._call(""):
            return sorted(c.name for c in self._client.get_collections().collections)

    def create(self, collection: str, dim: int) -> None:
        with self._call(collection):
            if self._client.collection_exists(collection):
                if self.dim(collection) != dim:
                    raise ConflictError(f"collection {collection} has dimension {self.dim(collection)}, not {dim}")
                return
            self._client.create_collection(
                collection,
                vectors_config=models.VectorParams(size=dim, distance=models.Distance.COSINE),
                quantization_config=_codes(self._quantisation),
            )
            if self.shared:  # the local mode has no indexes and warns of each
                for key, kind in INDEXED.items():
                    self._client.create_payload_index(collection, key, field_schema=_SCHEMAS[kind])
            self._dims[collection] = dim

    def dim(self, collection: str) -> int:
        if collection not in self._dims:
            with self._call(collection):
                params = self._client.get_collection(collection).config.params.vectors
            if not isinstance(params, models.VectorParams):
                raise ConflictError(f"collection {collection} is not one of ours: it has several vectors a point")
            self._dims[collection] = params.size
        return self._dims[collection]

    def drop(self, collection: str) -> None:
        with self._call(collection):
            self._dims.pop(collection, None)
            self._client.delete_collection(collection)

    def upsert(self, collection: str, points: Sequence[Point]) -> None:
        dim = self.dim(collection)
        for point in points:
            if point.vector is None or len(point.vector) != dim:
                raise InvalidInputError(f"vector of {point.id} does not have the {dim} dimensions of {collection}")
        for start in range(0, len(points), UPSERT_BATCH):
            batch = [
                models.PointStruct(id=p.id, vector=_floats(p.vector), payload=dict(p.payload))
                for p in points[start : start + UPSERT_BATCH]
            ]
            with self._call(collection):
                self._client.upsert(collection, batch, wait=True)

    def search(self, collection: str, vector: Vector, *, limit: int = 1, where: Filter | None = None) -> list[Scored]:
        return self.search_each(collection, [vector], limit=limit, where=where)[0]

    def search_each(
        self, collection: str, vectors: Sequence[Vector], *, limit: int = 1, where: Filter | None = None
    ) -> list[list[Scored]]:
        dim = self.dim(collection)
        if odd := [len(v) for v in vectors if len(v) != dim]:
            raise InvalidInputError(f"vector has {odd[0]} dimensions; {collection} has {dim}", field="vector")
        requests = [
            models.QueryRequest(
                query=_floats(vector),
                limit=limit,
                filter=_to_filter(where),
                with_payload=True,
                params=self._search_params(limit),
            )
            for vector in vectors
        ]
        with self._call(collection):
            found = self._client.query_batch_points(collection, requests)
        return [
            [Scored(id=str(p.id), score=float(p.score), payload=p.payload or {}) for p in one.points] for one in found
        ]

    def get(self, collection: str, ids: Sequence[str], *, with_vectors: bool = False) -> list[Point]:
        if not ids:
            return []
        with self._call(collection):
            found = self._client.retrieve(collection, list(ids), with_payload=True, with_vectors=with_vectors)
        return [_from_record(r) for r in found]

    def scroll(
        self, collection: str, *, where: Filter | None = None, with_vectors: bool = False, only: Sequence[str] = ()
    ) -> Iterator[Point]:
        offset: Any = None
        while True:
            with self._call(collection):
                records, offset = self._client.scroll(
                    collection,
                    scroll_filter=_to_filter(where),
                    limit=SCROLL_BATCH,
                    offset=offset,
                    with_payload=list(only) or True,
                    with_vectors=with_vectors,
                )
            for record in records:
                yield _from_record(record)
            if offset is None:
                return

    def extremes(self, collection: str, key: str, *, limit: int, largest: bool = False) -> list[Point]:
        direction = models.Direction.DESC if largest else models.Direction.ASC
        with self._call(collection):
            records, _ = self._client.scroll(
                collection, limit=limit, order_by=models.OrderBy(key=key, direction=direction), with_payload=True
            )
        return [_from_record(r) for r in records]

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        if ids:
            with self._call(collection):
                self._client.delete(collection, models.PointIdsList(points=list(ids)), wait=True)

    def set_payloads(self, collection: str, payloads: Mapping[str, Mapping[str, Any]]) -> None:
        with self._call(collection):
            for record in self._client.retrieve(collection, list(payloads), with_payload=False):
                changed = dict(payloads[str(record.id)])
                self._client.set_payload(collection, changed, points=[record.id], wait=True)

    def count(self, collection: str, where: Filter | None = None) -> int:
        with self._call(collection):
            return int(self._client.count(collection, count_filter=_to_filter(where), exact=True).count)

    def tidy(self, collection: str) -> bool:
        """Nothing to do: a server tidies by itself and the local mode has nothing to tidy."""
        return False

    def disk_bytes(self) -> int | None:
        if self._folder is None:
            return None
        return sum(p.stat().st_blocks * 512 for p in self._folder.rglob("*") if p.is_file())

    def close(self) -> None:
        self._client.close()
        if self._holder is not None:
            self._holder.release()

    @contextlib.contextmanager
    def _call(self, collection: str) -> Iterator[None]:
        """The lock of the local mode, and one error for whatever goes wrong on the way to a server."""
        from grpc import RpcError  # type: ignore[import-untyped]
        from qdrant_client.http.exceptions import ApiException

        with self._lock, warnings.catch_warnings() if not self.shared else contextlib.nullcontext():
            try:
                yield
            except (RpcError, ApiException, OSError) as error:
                text = _reason(error)
                if "doesn't exist" in text or "not found" in text.lower():
                    raise NotFoundError(f"no collection {collection}") from error
                raise UnavailableError(f"the Qdrant server does not serve us: {text[:300]}") from error
            except ValueError as error:  # what the local mode raises
                if "not found" in str(error):
                    raise NotFoundError(f"no collection {collection}") from error
                raise

    def _search_params(self, limit: int) -> models.SearchParams | None:
        if self._quantisation == "none" or not self.shared:
            return None
        codes = models.QuantizationSearchParams(rescore=True, oversampling=oversampling(self._quantisation, limit))
        return models.SearchParams(quantization=codes)


_SCHEMAS = {"integer": models.PayloadSchemaType.INTEGER, "keyword": models.PayloadSchemaType.KEYWORD}


def _connect(url: str, api_key: str | None) -> QdrantClient:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    try:
        grpc_port = int(dict(p.split("=", 1) for p in parts.query.split("&") if "=" in p).get("grpc_port", "6334"))
        client = QdrantClient(
            url=f"{parts.scheme}://{parts.hostname}:{parts.port or 6333}{parts.path.rstrip('/')}",
            grpc_port=grpc_port,
            prefer_grpc=True,
            api_key=api_key,
            timeout=TIMEOUT_S,
            check_compatibility=False,
        )
        client.get_collections()
    except Exception as error:  # the client raises errors of four libraries
        where = f"{parts.scheme}://{parts.hostname}:{parts.port or 6333}"
        raise UnavailableError(f"no Qdrant server at {where}: {_reason(error)[:300]}") from error
    return client


def _reason(error: BaseException) -> str:
    details = getattr(error, "details", None)
    text = str(details() if callable(details) else error) or type(error).__name__
    return " ".join(text.split())


def _codes(quantisation: Quantisation) -> models.QuantizationConfig | None:
    if quantisation == "int8":
        scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
        return models.ScalarQuantization(scalar=scalar)
    if quantisation == "binary":
        return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
    return None


def _floats(vector: Vector | None) -> list[float]:
    floats: list[float] = np.asarray(vector, dtype=np.float32).tolist()
    return floats


def _from_record(record: Any) -> Point:
    vector = None if record.vector is None else np.asarray(record.vector, dtype=np.float32)
    return Point(id=str(record.id), payload=record.payload or {}, vector=vector)


def _to_filter(where: Filter | None) -> models.Filter | None:
    if not where:
        return None
    must: list[Any] = [models.FieldCondition(key=k, match=models.MatchValue(value=v)) for k, v in where.equals.items()]
    must += [models.FieldCondition(key=k, range=models.Range(lte=v)) for k, v in where.at_most.items()]
    must_not: list[Any] = [models.HasIdCondition(has_id=list(where.not_ids))] if where.not_ids else []
    return models.Filter(must=must, must_not=must_not)
