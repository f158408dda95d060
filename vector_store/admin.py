"""Looking after the cache: statistics, lists, checks, manual eviction and purge. Plain functions on an `ImageCache`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from modm_tasks.errors import InvalidInputError, SourceImageError
from vector_store.backends import codes_for
from vector_store.cache import ImageCache, collection_name
from vector_store.entries import ImageEntry, entry_of
from vector_store.eviction import Held, choose

#: A file without a vector may be a result that is not cached, or one about to be; without word from the ledger only
#: files older than it keeps records of are taken for left-overs.
KEEP_UNKNOWN_FILES_S = 2 * 86_400.0
KEEP_NEW_FILES_S = 600.0


def stats(cache: ImageCache, namespace: str | None = None) -> dict[str, Any]:
    """Size, capacity, uses by steps skipped, age of hits, depth and disk; one item per namespace.

    Uses are those of the images held: an evicted image takes its own with it.
    """
    names = cache.namespaces() if namespace is None else [namespace]
    files, image_bytes = cache.images.usage()
    ages = np.asarray(cache.recent_hit_ages_s, dtype=np.float64)
    return {
        "embedder": cache.embedder_identity,
        "dim": cache.dim,
        "capacity": cache.settings.cache.capacity,
        "eviction": cache.settings.cache.eviction,
        "admission": cache.settings.cache.admission,
        "quantisation": codes_for(cache.settings.cache.quantisation, cache.settings.cache.capacity),
        "namespaces": {name: _namespace_stats(cache, name) for name in names},
        "hit_age_s": {f"p{q}": float(np.percentile(ages, q)) for q in (50, 90, 99)} if len(ages) else {},
        "files": files,
        "image_bytes": image_bytes,
        "vector_bytes": cache.backend.disk_bytes(),
        "other_embedders": sorted(_other_collections(cache)),
    }


def _namespace_stats(cache: ImageCache, namespace: str) -> dict[str, Any]:
    images = hits = used = 0
    age_sum_s, first, last = 0.0, 0.0, 0.0
    by_k: Counter[str] = Counter()
    by_depth: Counter[str] = Counter()
    by_model: Counter[str] = Counter()
    for entry in cache.iterate(namespace):
        images, hits, used = images + 1, hits + entry.hits, used + (entry.hits > 0)
        age_sum_s += entry.hit_age_sum_s
        by_k.update(entry.hits_by_k)
        by_depth[str(entry.depth)] += 1
        by_model[entry.model] += 1
        first = min(first or entry.created_s, entry.created_s)
        last = max(last, entry.created_s)
    return {
        "images": images,
        "hits": hits,
        "hits_by_k": dict(sorted(by_k.items(), key=lambda item: int(item[0]))),
        "mean_hit_age_s": age_sum_s / hits if hits else None,
        "used_images": used,
        "by_depth": dict(sorted(by_depth.items())),
        "by_model": dict(by_model),
        "oldest_s": first or None,
        "newest_s": last or None,
    }


def list_entries(
    cache: ImageCache, namespace: str, *, limit: int = 50, before_seq: int | None = None, client: str | None = None
) -> list[ImageEntry]:
    """The newest first. ``before_seq`` goes on where the last page ended. Reads the whole namespace to sort it."""
    entries = [e for e in cache.iterate(namespace) if client is None or e.client == client]
    entries.sort(key=lambda e: e.seq, reverse=True)
    return [e for e in entries if before_seq is None or e.seq < before_seq][:limit]


def evict(
    cache: ImageCache,
    namespace: str,
    *,
    older_than_s: float | None = None,
    below: float | None = None,
    keep: int | None = None,
    now_s: float,
    in_use: Callable[[Sequence[str]], set[str]] | None = None,
) -> list[str]:
    """Evict by hand. Give one: created more than ``older_than_s`` ago; utility (steps saved) under ``below``; or all
    but the ``keep`` that the eviction policy wants most. Returns the ids that left. Raises InvalidInputError.
    """
    given = [x for x in (older_than_s, below, keep) if x is not None]
    if len(given) != 1 or given[0] < 0:
        raise InvalidInputError("give exactly one of older-than, below and keep, and not negative", field="evict")
    entries = list(cache.iterate(namespace))
    if older_than_s is not None:
        chosen = [e.id for e in entries if now_s - e.created_s > older_than_s]
    elif below is not None:
        chosen = [e.id for e in entries if e.utility < below]
    else:
        assert keep is not None
        chosen = choose([held_of(e) for e in entries], keep, cache.settings.cache.eviction)
    busy = in_use(chosen) if in_use is not None and chosen else set()
    return cache.remove(namespace, [i for i in chosen if i not in busy])


def held_of(entry: ImageEntry) -> Held:
    """What eviction knows of an entry."""
    return Held(
        id=entry.id,
        seq=entry.seq,
        created_s=entry.created_s,
        last_used_s=entry.last_used_s,
        utility=entry.utility,
    )


def purge(
    cache: ImageCache,
    namespace: str | None = None,
    *,
    image: str | None = None,
    client: str | None = None,
    prompt: str | None = None,
) -> list[str]:
    """Delete an image, a client's images or a prompt's, and everything refined from them, with files.

    ``prompt`` is compared without case and outer space. Every namespace is searched where none is named. An image
    that was evicted before is still found among the ancestors of those refined from it, if named by id. In-use images
    go too: a purge is a demand, and a worker whose source is gone draws with the large model instead.
    """
    if sum(x is not None for x in (image, client, prompt)) != 1:
        raise InvalidInputError("give exactly one of image, client and prompt", field="purge")
    removed: list[str] = []
    for name in cache.namespaces() if namespace is None else [namespace]:
        entries = list(cache.iterate(name))
        roots = {e.id for e in entries if _is_meant(e, image, client, prompt)} | ({image} if image else set())
        removed += cache.remove(name, descendants(entries, roots))
    return removed


def _is_meant(entry: ImageEntry, image: str | None, client: str | None, prompt: str | None) -> bool:
    if prompt is not None:
        return entry.prompt.strip().casefold() == prompt.strip().casefold()
    return entry.id == image if image is not None else entry.client == client


def descendants(entries: Sequence[ImageEntry], roots: set[str]) -> list[str]:
    """Ids among ``entries`` that are a root or descend from one, by source or by ancestors."""
    tainted, grew = set(roots), True
    while grew:
        more = {
            e.id for e in entries if e.id not in tainted and tainted.intersection((*e.ancestors, e.source_id or ""))
        }
        grew = bool(more)
        tainted |= more
    return [e.id for e in entries if e.id in tainted]


@dataclass(kw_only=True)
class VerifyReport:
    """What is wrong. Lists hold ids, URIs or collection names; ``repaired`` counts what was mended."""

    checked: int = 0
    vectors_without_file: list[str] = field(default_factory=list)
    unreadable_files: list[str] = field(default_factory=list)
    files_without_vector: list[str] = field(default_factory=list)
    bad_vectors: list[str] = field(default_factory=list)
    bad_entries: list[str] = field(default_factory=list)
    wrong_dimension: list[str] = field(default_factory=list)
    other_embedders: list[str] = field(default_factory=list)
    repaired: int = 0

    @property
    def clean(self) -> bool:
        """Nothing is wrong. Collections of another embedder are not wrong, only unused until a reindex."""
        return not (
            self.vectors_without_file
            or self.unreadable_files
            or self.files_without_vector
            or self.bad_vectors
            or self.bad_entries
            or self.wrong_dimension
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"clean": self.clean}


def verify(
    cache: ImageCache,
    namespace: str | None = None,
    *,
    repair: bool = False,
    deep: bool = False,
    now_s: float,
    referenced: Callable[[Sequence[str]], set[str]] | None = None,
    rest: Callable[[], None] = lambda: None,
) -> VerifyReport:
    """Compare vectors with files. ``deep`` decodes every image; ``referenced`` says which of some request ids the
    ledger still needs the file of; ``rest`` is called after each image, so that a walk beside serving may be slow.

    Repair deletes vectors whose image is gone or unreadable, broken entries, collections of another dimension, and
    files that nothing refers to. Files are looked at only where all namespaces are.
    """
    report = VerifyReport(other_embedders=sorted(_other_collections(cache)))
    names = cache.namespaces() if namespace is None else [namespace]
    for name in names:
        collection = cache.name(name)
        if collection in cache.backend.collections() and cache.backend.dim(collection) != cache.dim:
            report.wrong_dimension.append(collection)
            continue
        _verify_namespace(cache, name, report, deep=deep, repair=repair, rest=rest)
    if repair:
        for collection in report.wrong_dimension:
            cache.backend.drop(collection)
            report.repaired += 1
    if namespace is None:
        _verify_files(cache, report, repair=repair, now_s=now_s, referenced=referenced)
    return report


def _verify_namespace(
    cache: ImageCache, namespace: str, report: VerifyReport, *, deep: bool, repair: bool, rest: Callable[[], None]
) -> None:
    bad: list[str] = []
    for point in cache.backend.scroll(cache.name(namespace), with_vectors=True):
        rest()
        report.checked += 1
        try:
            entry = entry_of(point.id, point.payload)
        except InvalidInputError:
            report.bad_entries.append(point.id)
            bad.append(point.id)
            continue
        if point.vector is None or not abs(float(np.linalg.norm(point.vector)) - 1) < 0.01:
            report.bad_vectors.append(point.id)
        elif not cache.images.exists(entry.uri):
            report.vectors_without_file.append(point.id)
        elif deep and not _readable(cache, entry.uri):
            report.unreadable_files.append(point.id)
        else:
            continue
        bad.append(point.id)
    if repair:
        report.repaired += len(cache.remove(namespace, bad))


def _readable(cache: ImageCache, uri: str) -> bool:
    try:
        cache.images.read(uri)
    except SourceImageError:
        return False
    return True


def _verify_files(
    cache: ImageCache,
    report: VerifyReport,
    *,
    repair: bool,
    now_s: float,
    referenced: Callable[[Sequence[str]], set[str]] | None,
) -> None:
    known = {
        str(point.payload.get("uri"))
        for collection in cache.backend.collections()
        if collection.startswith(("images_", "build_"))
        for point in cache.backend.scroll(collection, only=("uri",))
    }
    grace_s = KEEP_UNKNOWN_FILES_S if referenced is None else KEEP_NEW_FILES_S
    loose = {
        stored.uri: stored.uri[3:39]
        for stored in cache.images.list()
        if stored.uri not in known and stored.modified_s is not None and now_s - stored.modified_s > grace_s
    }
    needed = referenced(list(loose.values())) if referenced is not None and loose else set()
    report.files_without_vector += sorted(uri for uri, request_id in loose.items() if request_id not in needed)
    if repair:
        report.repaired += sum(cache.delete_file(uri) for uri in report.files_without_vector)


def _other_collections(cache: ImageCache) -> list[str]:
    own = collection_name(cache.embedder_identity, "")
    return [c for c in cache.backend.collections() if c.startswith("images_") and not c.startswith(own)]
