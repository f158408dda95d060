"""An import over HTTP: the folder is here, the cache is with the orchestrator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modm_tasks.errors import NotFoundError
from vector_store.folder import BATCH, Item, Problem, batches, item_id, read_item, scan
from vector_store.progress import ImportReport, Pace, Progress

if TYPE_CHECKING:
    from modm_tasks.client import Client

#: Most bytes of one upload; a batch of large photographs goes in parts.
MAX_UPLOAD_BYTES = 128 * 2**20


def import_over_http(
    client: Client,
    folder: Path,
    *,
    namespace: str = "default",
    progress: Callable[[Progress], None] | None = None,
) -> ImportReport:
    """Import a folder into the orchestrator's cache, in batches of 32 files.

    Asks first which images are there already, so a run that was killed goes on without uploading again. Raises
    NotFoundError without a folder, UnavailableError where the orchestrator goes away (what is in stays in).
    """
    items, problems = scan(folder)
    report = ImportReport(problems=problems)
    pace = Pace(len(items) + len(problems))
    for batch in batches(items, BATCH):
        read: list[tuple[str, Item, bytes]] = []
        for item in batch:
            try:
                data = read_item(folder, item.file)
            except NotFoundError as error:
                report.problems.append(Problem(file=item.file, reason=str(error)))
                continue
            read.append((item_id(namespace, item.file, data), item, data))
        known = client.post("/v1/cache/known", {"ids": [i for i, _, _ in read], "namespace": namespace})["known"]
        fresh = [(item, data) for image_id, item, data in read if image_id not in set(known)]
        report.skipped += len(read) - len(fresh)
        for part in _parts(fresh):
            _upload(client, part, namespace, report)
        if progress is not None:
            progress(pace.at(report))
    return report


def _upload(client: Client, part: list[tuple[Item, bytes]], namespace: str, report: ImportReport) -> None:
    captions = json.dumps([item.as_json() for item, _ in part])
    answer = client.upload(
        "/v1/cache/import",
        [("files", data) for _, data in part],
        {"captions": captions, "namespace": namespace},
    )
    problems = [Problem(file=p["file"], reason=p["reason"]) for p in answer["problems"]]
    report.add(ImportReport(imported=answer["imported"], skipped=answer["skipped"], problems=problems))


def _parts(items: list[tuple[Item, bytes]]) -> list[list[tuple[Item, bytes]]]:
    parts: list[list[tuple[Item, bytes]]] = []
    size = 0
    for item, data in items:
        if not parts or size + len(data) > MAX_UPLOAD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append((item, data))
        size += len(data)
    return parts
