"""The image cache: finished images by the vector of what they show, one collection per (embedder, namespace).

Points are named by request id, so a completion that is delivered twice is stored once. Vectors and files leave together,
vectors first: a file too many wastes disk, a vector too many sends a worker to an image that is gone. `reader` has what
only looks.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from modm_tasks.errors import InvalidInputError, ModmError, NotFoundError
from modm_tasks.image_store import ImageStore
from modm_tasks.settings import Settings
from vector_store.backends.base import Point, VectorBackend
from vector_store.embedder import Vector
from vector_store.entries import USE_FIELDS, ImageEntry, Use, entry_of
from vector_store.eviction import Held, choose
from vector_store.reader import CacheReader, collection_name, namespaces_of

__all__ = ["ImageCache", "collection_name", "namespaces_of"]

log = logging.getLogger(__name__)

#: Images that come or go before the store is tidied, at least; a fifth of the capacity where that is more.
TIDY_FROM = 1000
_HELD_FIELDS = ("seq", "created_s", "last_used_s", "utility")


class ImageCache(CacheReader):
    """Thread-safe; one lock around what reads before it writes.

    With a Qdrant server several processes may share the collections. Then two inserts at the same moment may get the
    same ``seq`` (they are equally old) and two uses of one image may be counted once.
    """

    def __init__(
        self,
        backend: VectorBackend,
        embedder_identity: str,
        dim: int,
        settings: Settings,
        image_store: ImageStore,
    ) -> None:
        super().__init__(backend, embedder_identity, dim)
        self.settings, self.images = settings, image_store
        self.lock = threading.RLock()
        #: Age of the image at each of the latest uses in this process, seconds.
        self.recent_hit_ages_s: deque[float] = deque(maxlen=5000)
        self._next_seq: dict[str, int] = {}
        self._since_evict: dict[str, int] = {}
        #: Images that came and that left since the store was last tidied.
        self._added: dict[str, int] = {}
        self._deleted: dict[str, int] = {}
        self._made: set[str] = set()

    def add(self, entry: ImageEntry, vector: Vector) -> ImageEntry:
        """Store an image that is already in the image store. Returns the entry with its ``seq``.

        Adding an id again replaces it and keeps its place and its uses. Raises InvalidInputError for another dimension.
        """
        return self.add_many([(entry, vector)])[0]

    def add_many(self, items: Sequence[tuple[ImageEntry, Vector]]) -> list[ImageEntry]:
        """Several at once, all of one namespace."""
        if not items:
            return []
        namespace = items[0][0].namespace
        for entry, vector in items:
            if entry.namespace != namespace:
                raise InvalidInputError(f"entries of {entry.namespace!r} and {namespace!r} at once", field="namespace")
            if np.shape(vector) != (self.dim,) or not np.isfinite(vector).all():
                raise InvalidInputError(
                    f"vector of {entry.id} is not {self.dim} finite numbers: shape {np.shape(vector)}", field="vector"
                )
        with self.lock:
            self._ensure(namespace)
            known = {p.id: p.payload for p in self.backend.get(self.name(namespace), [e.id for e, _ in items])}
            next_seq = self._seq(namespace)
            done: list[ImageEntry] = []
            for entry, _ in items:
                if entry.id in known:
                    done.append(_with_history(entry, entry_of(entry.id, known[entry.id])))
                else:
                    done.append(replace(entry, seq=next_seq, ancestors=self._ancestors(entry)))
                    next_seq += 1
            self.put_raw(namespace, done, [vector for _, vector in items])
            self._next_seq[namespace] = next_seq
            new = len(done) - len(known)
            self._since_evict[namespace] = self._since_evict.get(namespace, 0) + new
            self._added[namespace] = self._added.get(namespace, 0) + new
            self._tidy(namespace)
        return done

    def _ancestors(self, entry: ImageEntry) -> tuple[str, ...]:
        if entry.ancestors or entry.source_id is None:
            return entry.ancestors
        source = self.get(entry.source_id, entry.namespace)
        return (*(source.ancestors if source is not None else ()), entry.source_id)

    def put_raw(self, namespace: str, entries: Sequence[ImageEntry], vectors: Sequence[Vector]) -> None:
        """Store entries as they are, ``seq`` included: for restore and reindex, which keep the order of insertion."""
        points = [Point(id=e.id, payload=e.payload(), vector=v) for e, v in zip(entries, vectors, strict=True)]
        with self.lock:
            self._ensure(namespace)
            self.backend.upsert(self.name(namespace), points)
            self._next_seq.pop(namespace, None)

    def touch(self, uses: Sequence[Use]) -> list[float]:
        """Note uses, for ``lru`` and ``utility`` and the statistics: (age of the image, s) of each. An image that has left
        has none."""
        ages_s: list[float] = []
        for namespace in dict.fromkeys(use.namespace for use in uses):
            mine = [use for use in uses if use.namespace == namespace]
            with self.lock:
                held = self.get_many(list(dict.fromkeys(use.id for use in mine)), namespace)
                changed: dict[str, ImageEntry] = {}
                for use in mine:
                    if (entry := changed.get(use.id) or held.get(use.id)) is not None:
                        changed[use.id] = entry.used(use)
                        ages_s.append(max(0.0, use.at_s - entry.created_s))
                if changed:
                    uses_of = {i: {name: getattr(e, name) for name in USE_FIELDS} for i, e in changed.items()}
                    self.backend.set_payloads(self.name(namespace), uses_of)
        self.recent_hit_ages_s.extend(ages_s)
        return ages_s

    def evict(self, namespace: str, in_use: Callable[[Sequence[str]], set[str]] | None = None) -> list[str]:
        """Bring a namespace back to its capacity; returns the ids that left, with their files.

        Call it after every insert: it acts once per capacity/100 inserts, because deleting points one by one fragments
        the store, so a namespace may hold 1 % more than its capacity. ``in_use`` says which of some ids a request still
        needs; they stay, and are chosen again next time.
        """
        batch = max(1, self.settings.cache.capacity // 100)
        with self.lock:
            if self._since_evict.get(namespace, batch) < batch:
                return []
            self._since_evict[namespace] = 0
            chosen = self._choose(namespace)
            busy = in_use(chosen) if in_use is not None and chosen else set()
            if busy.intersection(chosen):
                # They leave once released. Asked sooner than for another batch, but not at every insert: with a long queue
                # of hits the oldest images are in use all the time.
                self._since_evict[namespace] = batch - batch // 10
            return self.remove(namespace, [i for i in chosen if i not in busy])

    def _choose(self, namespace: str) -> list[str]:
        excess = self.count(namespace) - self.settings.cache.capacity
        if excess <= 0:
            return []
        if self.settings.cache.eviction == "fifo":
            return [p.id for p in self.backend.extremes(self.name(namespace), "seq", limit=excess)]
        held = [
            Held(id=p.id, **{k: p.payload[k] for k in _HELD_FIELDS})
            for p in self.backend.scroll(self.name(namespace), only=_HELD_FIELDS)
        ]
        return choose(held, self.settings.cache.capacity, self.settings.cache.eviction)

    def remove(self, namespace: str, ids: Sequence[str]) -> list[str]:
        """Delete images, vectors first, then files. Returns the ids that were there."""
        if not ids:
            return []
        name = self.name(namespace)
        with self.lock:
            try:
                found = self.backend.get(name, ids)
            except NotFoundError:
                return []
            self.backend.delete(name, [p.id for p in found])
            self._deleted[namespace] = self._deleted.get(namespace, 0) + len(found)
        for point in found:
            self.delete_file(str(point.payload.get("uri", "")))
        self._tidy(namespace)
        return [p.id for p in found]

    def delete_file(self, uri: str) -> bool:
        """Delete an image file; a failure is logged, as `verify` finds the file later."""
        try:
            return self.images.delete(uri)
        except ModmError as error:
            log.warning("image not deleted: %s", error)
            return False

    def _tidy(self, namespace: str) -> None:
        """New points have no codes yet, so a search scans them exactly; those that left are skipped one by one."""
        with self.lock:
            changed = max(self._added.get(namespace, 0), self._deleted.get(namespace, 0))
            if changed >= max(TIDY_FROM, self.settings.cache.capacity // 5):
                self._added[namespace] = self._deleted[namespace] = 0
                try:
                    self.backend.tidy(self.name(namespace))
                except ModmError as error:  # what was to be written is written; the next fifth tries again
                    log.warning("searches stay slower for now: %s", error)

    def clear(self, namespace: str) -> int:
        """Delete a namespace with its files. Returns how many images it held."""
        with self.lock:
            uris = [entry.uri for entry in self.iterate(namespace)]
            self.backend.drop(self.name(namespace))
            for state in (self._next_seq, self._since_evict, self._added, self._deleted):
                state.pop(namespace, None)
            self._made.discard(namespace)
        for uri in uris:
            self.delete_file(uri)
        return len(uris)

    def tidy(self) -> None:
        """Reclaim deleted points and build codes in every namespace; call it at start, before serving."""
        for namespace in self.namespaces():
            self.backend.tidy(self.name(namespace))

    def close(self) -> None:
        """Release the store."""
        self.backend.close()

    def _ensure(self, namespace: str) -> None:
        if namespace not in self._made:
            self.backend.create(self.name(namespace), self.dim)
            self._made.add(namespace)

    def _seq(self, namespace: str) -> int:
        """The next sequence number, above every one in the store, so that a lost Redis cannot restart it."""
        if namespace not in self._next_seq or self.backend.shared:
            top = self.backend.extremes(self.name(namespace), "seq", limit=1, largest=True)
            stored = int(top[0].payload["seq"]) + 1 if top else 1
            self._next_seq[namespace] = max(stored, self._next_seq.get(namespace, 1))
        return self._next_seq[namespace]


def _with_history(entry: ImageEntry, kept: ImageEntry) -> ImageEntry:
    """``entry`` in the place of ``kept``, with its uses."""
    return replace(
        entry,
        seq=kept.seq,
        hits=kept.hits,
        hits_by_k=kept.hits_by_k,
        hit_age_sum_s=kept.hit_age_sum_s,
        utility=kept.utility,
        last_used_s=max(kept.last_used_s, entry.last_used_s),
        ancestors=kept.ancestors or entry.ancestors,
    )
