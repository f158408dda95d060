"""Looking into the image cache: the nearest images to a vector, one entry, all of them.

Vectors of two embedders never meet: the collection's name carries the embedder's identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from modm_tasks.errors import InvalidInputError, NotFoundError
from modm_tasks.image_store import request_id_of
from vector_store.backends.base import Filter, Scored, VectorBackend
from vector_store.embedder import Vector
from vector_store.entries import ImageEntry, Match, entry_of

#: Results fetched at once when a condition that most images meet is checked here and not by the engine.
_LOOK_AHEAD = 4


def collection_name(identity: str, namespace: str, kind: str = "images") -> str:
    """``images_{identity}_{namespace}``; an identity has no underscore."""
    return f"{kind}_{identity}_{namespace}"


def namespaces_of(collections: Sequence[str], identity: str, kind: str = "images") -> list[str]:
    """Namespaces among collection names."""
    prefix = collection_name(identity, "", kind)
    return sorted(name.removeprefix(prefix) for name in collections if name.startswith(prefix))


class CacheReader:
    """One embedder's collections of one store, read only. Thread-safe."""

    def __init__(self, backend: VectorBackend, embedder_identity: str, dim: int) -> None:
        self.backend, self.embedder_identity, self.dim = backend, embedder_identity, dim

    def name(self, namespace: str) -> str:
        """The collection of a namespace."""
        return collection_name(self.embedder_identity, namespace)

    def search(
        self,
        vector: Vector,
        *,
        namespace: str = "default",
        size: str | None = None,
        client: str | None = None,
        max_depth: int | None = None,
        exclude_ids: Sequence[str] = (),
        limit: int = 1,
    ) -> list[Match]:
        """The nearest images, best first. ``vector`` is float32 [dim]. An unknown namespace holds nothing."""
        return self.search_each(
            [vector],
            namespace=namespace, size=size, client=client, max_depth=max_depth, exclude_ids=[exclude_ids], limit=limit,
        )[0]  # fmt: skip

    def search_each(
        self,
        vectors: Sequence[Vector],
        *,
        namespace: str = "default",
        size: str | None = None,
        client: str | None = None,
        max_depth: int | None = None,
        exclude_ids: Sequence[Sequence[str]],
        limit: int = 1,
    ) -> list[list[Match]]:
        """``search`` for several vectors, each with the ids that it excludes.

        ``size`` and ``client`` choose few images, so the engine filters by them. Nearly all images meet the other two
        conditions, which would double the engine's time (measured: 1 ms against 2.2 ms at 10,000), so more results are
        taken and checked here, and only where that leaves too few does the engine filter by everything.
        """
        few = {k: v for k, v in (("size", size), ("client", client)) if v is not None}
        want = limit + max(map(len, exclude_ids), default=0) + (_LOOK_AHEAD if max_depth is not None else 0)
        out: list[list[Match]] = []
        found = self._search(namespace, vectors, want, Filter(equals=few))
        for vector, excluded, near in zip(vectors, exclude_ids, found, strict=True):
            fit = [one for one in near if one.id not in excluded and not _too_deep(one, max_depth)]
            if len(fit) < limit and len(near) == want:
                at_most = {} if max_depth is None else {"depth": max_depth}
                where = Filter(equals=few, at_most=at_most, not_ids=tuple(excluded))
                (fit,) = self._search(namespace, [vector], limit, where)
            out.append([_match(one) for one in fit[:limit]])
        return out

    def _search(self, namespace: str, vectors: Sequence[Vector], limit: int, where: Filter) -> list[list[Scored]]:
        try:
            return self.backend.search_each(self.name(namespace), vectors, limit=limit, where=where)
        except NotFoundError:
            if odd := [len(v) for v in vectors if len(v) != self.dim]:
                raise InvalidInputError(f"vector has {odd[0]} dimensions, not {self.dim}", field="vector") from None
            return [[] for _ in vectors]

    def get(self, image_id: str, namespace: str = "default") -> ImageEntry | None:
        """One entry, or None."""
        return self.get_many([image_id], namespace).get(image_id)

    def get_many(self, image_ids: Sequence[str], namespace: str = "default") -> dict[str, ImageEntry]:
        """Those that are there, by id."""
        try:
            return {p.id: entry_of(p.id, p.payload) for p in self.backend.get(self.name(namespace), image_ids)}
        except NotFoundError:
            return {}

    def vector_of(self, image_id: str, namespace: str = "default") -> Vector | None:
        """The image vector, float32 [dim], or None."""
        try:
            found = self.backend.get(self.name(namespace), [image_id], with_vectors=True)
        except NotFoundError:
            return None
        return found[0].vector if found else None

    def holds_uri(self, uri: str) -> bool:
        """Whether any namespace refers to this file."""
        try:
            image_id = request_id_of(uri)
        except InvalidInputError:
            return False
        entries = (self.get(image_id, namespace) for namespace in self.namespaces())
        return any(entry is not None and entry.uri == uri for entry in entries)

    def iterate(self, namespace: str = "default") -> Iterator[ImageEntry]:
        """All entries, in no order; read in pages, so what is written meanwhile may or may not come."""
        try:
            for point in self.backend.scroll(self.name(namespace)):
                yield entry_of(point.id, point.payload)
        except NotFoundError:
            return

    def vectors(self, namespace: str = "default") -> tuple[list[str], Vector]:
        """(ids, float32 [n, dim]), row for row."""
        ids: list[str] = []
        rows: list[Vector] = []
        try:
            for point in self.backend.scroll(self.name(namespace), with_vectors=True, only=("seq",)):
                if point.vector is not None:
                    ids.append(point.id)
                    rows.append(point.vector)
        except NotFoundError:
            pass
        return ids, np.asarray(rows, dtype=np.float32).reshape(len(ids), self.dim)

    def namespaces(self) -> list[str]:
        """Those of this embedder."""
        return namespaces_of(self.backend.collections(), self.embedder_identity)

    def count(self, namespace: str = "default") -> int:
        """Images held."""
        try:
            return self.backend.count(self.name(namespace))
        except NotFoundError:
            return 0


def _too_deep(found: Scored, max_depth: int | None) -> bool:
    return max_depth is not None and int(found.payload.get("depth", 0)) > max_depth


def _match(found: Scored) -> Match:
    similarity = min(1.0, max(0.0, found.score))
    return Match(entry=entry_of(found.id, found.payload, similarity=similarity), similarity=similarity)
