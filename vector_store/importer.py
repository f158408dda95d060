"""Filling the cache from images that exist already: the paper's pre-filled cache, or another system's archive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modm_tasks.errors import ModmError, NotFoundError, SourceImageError
from modm_tasks.image_store import decode_image, path_for
from vector_store.cache import ImageCache
from vector_store.embedder import Embedder
from vector_store.entries import ImageEntry
from vector_store.folder import MAX_FILE_BYTES, Item, Problem, batches, item_id, read_item, scan
from vector_store.progress import ImportReport, Pace, Progress

MIN_SIDE_PX, MAX_SIDE_PX = 16, 4096


def import_folder(
    cache: ImageCache,
    embedder: Embedder,
    folder: Path,
    *,
    namespace: str = "default",
    progress: Callable[[Progress], None] | None = None,
    now_s: float | None = None,
) -> ImportReport:
    """Import a folder (`folder.scan` says what counts as a caption). What is unreadable is listed, not fatal.

    Killed half-way, it goes on where it stopped when run again: ids come from path and content. When more images come
    than the cache holds, the eviction policy decides, as for any other. Raises NotFoundError without a folder.
    """
    items, problems = scan(folder)
    report = ImportReport(problems=problems)
    pace = Pace(len(items) + len(problems))
    for batch in batches(items):
        read: list[tuple[Item, bytes]] = []
        for item in batch:
            try:
                read.append((item, read_item(folder, item.file)))
            except NotFoundError as error:
                report.problems.append(Problem(file=item.file, reason=str(error)))
        report.add(import_batch(cache, embedder, read, namespace=namespace, now_s=now_s or time.time()))
        cache.evict(namespace)
        if progress is not None:
            progress(pace.at(report))
    return report


def known_ids(cache: ImageCache, namespace: str, ids: Sequence[str]) -> set[str]:
    """Those already in the cache."""
    try:
        return {p.id for p in cache.backend.get(cache.name(namespace), ids)} if ids else set()
    except NotFoundError:
        return set()


def import_batch(
    cache: ImageCache,
    embedder: Embedder,
    items: Sequence[tuple[Item, bytes]],
    *,
    namespace: str,
    now_s: float,
    client: str = "",
) -> ImportReport:
    """Import images given as bytes, embedded as one batch. The format is sniffed, pixels are limited, all become
    PNG."""
    report = ImportReport()
    ids = [item_id(namespace, item.file, data) for item, data in items]
    known = known_ids(cache, namespace, ids)
    fresh: list[tuple[ImageEntry, Any]] = []
    taken: set[str] = set()
    for image_id, (item, data) in zip(ids, items, strict=True):
        if image_id in known or image_id in taken:
            report.skipped += 1
            continue
        try:
            image = _decode(item, data)
        except SourceImageError as error:
            report.problems.append(Problem(file=item.file, reason=str(error)))
            continue
        taken.add(image_id)
        fresh.append((_entry(image_id, item, image.size, namespace, now_s, client), image))
    if not fresh:
        return report
    vectors = embedder.embed_images([image for _, image in fresh])
    written: list[str] = []
    try:
        for entry, image in fresh:
            cache.images.write(entry.id, 0, image)
            written.append(entry.uri)
        cache.add_many([(entry, vector) for (entry, _), vector in zip(fresh, vectors, strict=True)])
    except ModmError:
        for uri in written:
            cache.delete_file(uri)
        raise
    report.imported = len(fresh)
    return report


def _decode(item: Item, data: bytes) -> Any:
    if len(data) > MAX_FILE_BYTES:
        raise SourceImageError(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
    image = decode_image(data)
    if min(image.size) < MIN_SIDE_PX or max(image.size) > MAX_SIDE_PX:
        raise SourceImageError(f"{image.width}x{image.height}; each side must be {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels")
    return image


def _entry(image_id: str, item: Item, size: tuple[int, int], namespace: str, now_s: float, client: str) -> ImageEntry:
    return ImageEntry(
        id=image_id,
        prompt=item.prompt,
        model=item.model or "imported",
        seed=item.seed or 0,
        size=f"{size[0]}x{size[1]}",
        depth=0,
        created_s=now_s,
        uri=path_for(image_id, 0),
        client=client,
        namespace=namespace,
    )
