"""When the embedder changes: embed the images again, beside the old collection, and switch at the end.

The new collection grows under another name (``build_...``), so that no search meets a half-filled one. When every
image is in, its points are copied into the collection that searches use, under the cache's lock and without embedding
(one write of 64 points at a time), and the old collection is dropped unless it is to be kept. Killed at any moment,
the next run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from modm_tasks.errors import ModmError, SourceImageError
from vector_store.backends.base import Point
from vector_store.cache import ImageCache, collection_name
from vector_store.embedder import Embedder
from vector_store.entries import ImageEntry, entry_of


@dataclass(frozen=True, kw_only=True)
class ReindexState:
    """How far a namespace is. ``unreadable`` images stay out of the new collection."""

    namespace: str
    total: int
    done: int
    unreadable: int
    finished: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Reindexer:
    """Works in steps, so that an HTTP call stays short. ``embedder`` must be the cache's."""

    def __init__(self, cache: ImageCache, embedder: Embedder) -> None:
        self.cache, self.embedder = cache, embedder
        self._unreadable: dict[str, set[str]] = {}

    def namespaces(self) -> list[str]:
        """Those that another embedder's collections hold images of."""
        return sorted({namespace for _, namespace in self._old()})

    def step(self, namespace: str, *, batch: int = 64, keep_old: bool = False) -> ReindexState:
        """Embed up to ``batch`` images; when none is left, switch."""
        old = [collection for collection, ns in self._old() if ns == namespace]
        staging = collection_name(self.cache.embedder_identity, namespace, "build")
        backend, bad = self.cache.backend, self._unreadable.setdefault(namespace, set())
        wanted = {p.id for collection in old for p in backend.scroll(collection, only=("seq",))}
        if not wanted and staging not in backend.collections():
            return ReindexState(namespace=namespace, total=0, done=0, unreadable=0, finished=True)
        backend.create(staging, self.cache.dim)
        done = {p.id for p in backend.scroll(staging, only=("seq",))} | self._live(namespace) & wanted
        todo = sorted(wanted - done - bad)[:batch]
        if todo:
            added = self._embed(old, staging, todo, bad)
            state = {"total": len(wanted), "done": len(done & wanted) + added, "unreadable": len(bad)}
            return ReindexState(namespace=namespace, finished=False, **state)
        self._switch(namespace, staging)
        if not keep_old:
            for collection in old:
                backend.drop(collection)
        del self._unreadable[namespace]
        return ReindexState(
            namespace=namespace, total=len(wanted), done=len(wanted) - len(bad), unreadable=len(bad), finished=True
        )

    def run(self, namespace: str, *, keep_old: bool = False) -> Iterator[ReindexState]:
        """All steps, one state each."""
        while True:
            state = self.step(namespace, keep_old=keep_old)
            yield state
            if state.finished:
                return

    def _old(self) -> list[tuple[str, str]]:
        own = collection_name(self.cache.embedder_identity, "")
        found = [c for c in self.cache.backend.collections() if c.startswith("images_") and not c.startswith(own)]
        return [(c, c.split("_", 2)[2]) for c in found if c.count("_") >= 2]

    def _live(self, namespace: str) -> set[str]:
        name = self.cache.name(namespace)
        if name not in self.cache.backend.collections():
            return set()
        return {p.id for p in self.cache.backend.scroll(name, only=("seq",))}

    def _embed(self, old: Sequence[str], staging: str, ids: Sequence[str], bad: set[str]) -> int:
        images, entries = [], []
        for entry in self._entries(old, ids).values():
            try:
                images.append(self.cache.images.read(entry.uri))
                entries.append(entry)
            except SourceImageError:
                bad.add(entry.id)
        bad.update(set(ids) - {e.id for e in entries})
        if not entries:
            return 0
        vectors = self.embedder.embed_images(images)
        self.cache.backend.upsert(
            staging, [Point(id=e.id, payload=e.payload(), vector=v) for e, v in zip(entries, vectors, strict=True)]
        )
        return len(entries)

    def _entries(self, old: Sequence[str], ids: Sequence[str]) -> dict[str, ImageEntry]:
        found: dict[str, ImageEntry] = {}
        for collection in old:
            for point in self.cache.backend.get(collection, ids):
                try:
                    found[point.id] = entry_of(point.id, point.payload)
                except ModmError:
                    continue
        return found

    def _switch(self, namespace: str, staging: str) -> None:
        cache = self.cache
        with cache.lock:
            live = self._live(namespace)
            moved = [p for p in cache.backend.scroll(staging, with_vectors=True) if p.id not in live]
            moved.sort(key=lambda p: int(p.payload["seq"]))
            # What came in under the new embedder is newer than all that moves, and `seq` must say so.
            first = cache.backend.extremes(cache.name(namespace), "seq", limit=1) if live else []
            shift = max(0, int(moved[-1].payload["seq"]) + 1 - int(first[0].payload["seq"])) if first and moved else 0
            for start in range(0, len(moved), 64):
                part = moved[start : start + 64]
                vectors = [p.vector for p in part if p.vector is not None]
                entries = [entry_of(p.id, p.payload) for p in part]
                cache.put_raw(namespace, [replace(e, seq=e.seq - shift) for e in entries], vectors)
            cache.backend.drop(staging)
