"""Downloads published metadata: resumable by HTTP range, checked, with progress."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from modm_tasks.errors import InvalidInputError, UnavailableError
from modm_tasks.output import interactive, note

if TYPE_CHECKING:
    import httpx

HUB = "https://huggingface.co/datasets"
DATASETS = {
    "diffusiondb": f"{HUB}/poloclub/diffusiondb/resolve/main/metadata.parquet",
    "mjhq": f"{HUB}/playgroundai/MJHQ-30K/resolve/main/meta_data.json",
}
SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_dataset(dataset: str, directory: Path, *, url: str | None = None, sha256: str | None = None) -> Path:
    """Download to ``directory``; returns the file. A part that is there already is gone on with.

    The checksum is ``sha256``, else the one that the hub itself states in its answer. Raises InvalidInputError for an
    unknown name, a folder that cannot be written or a wrong checksum (the file is then removed), UnavailableError where
    the server does not give the file, or stops in the middle: the same command goes on from there.
    """
    if dataset not in DATASETS:
        raise InvalidInputError(f"unknown dataset {dataset!r}; there are {', '.join(DATASETS)}", field="dataset")
    expected = sha256.lower() if sha256 is not None else None
    if expected is not None and not SHA256.fullmatch(expected):
        raise InvalidInputError("sha256 must be 64 hexadecimal digits", field="sha256")
    source = url or DATASETS[dataset]
    target = directory / f"{dataset}-{Path(urlsplit(source).path).name}"
    part = target.with_name(target.name + ".part")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if target.exists():
            note(f"{target.name} is there already")
        else:
            stated = _download(source, part)
            expected = expected or stated
            part.with_name(part.name + ".etag").unlink(missing_ok=True)
            os.replace(part, target)
        digest = file_sha256(target)
    except OSError as error:
        raise InvalidInputError(f"cannot write in {directory}: {error.strerror}", field="directory") from error
    if expected is not None and digest != expected:
        target.unlink()
        raise InvalidInputError(f"{target.name}: sha256 is {digest}, not {expected}; removed", field="sha256")
    note(f"sha256 {digest}{'' if expected is None else ', as expected'}")
    return target


def _download(url: str, part: Path) -> str | None:
    """Fill ``part``. Returns the sha256 that the server states, if it does."""
    import httpx

    for _ in range(2):
        try:
            with httpx.stream("GET", url, headers=_resume(part), follow_redirects=True, timeout=60) as answer:
                if answer.status_code != 416:
                    answer.raise_for_status()
                    _save(answer, part)
                    return _stated_sha256(answer)
                if answer.headers.get("content-range", "").endswith(f"/{part.stat().st_size}"):
                    return _stated_sha256(answer)  # the part is the whole
                part.unlink()  # longer than the file: of another version, so once more from the start
        except httpx.HTTPError as error:
            raise UnavailableError(f"cannot fetch {url}: {error}; run it again to go on", field="url") from error
    raise UnavailableError(f"cannot fetch {url}: the server refuses the range", field="url")


def _resume(part: Path) -> dict[str, str]:
    """Ask for the rest, and only if it is still the rest of the same file."""
    headers = {"accept-encoding": "identity"}  # a range counts bytes of the file, not of its compressed form
    if part.exists() and (have := part.stat().st_size):
        headers["range"] = f"bytes={have}-"
        tag = part.with_name(part.name + ".etag")
        if tag.exists():
            headers["if-range"] = tag.read_text()
    return headers


def _save(answer: httpx.Response, part: Path) -> None:
    resumed = answer.status_code == 206
    done = part.stat().st_size if resumed else 0
    total = int(answer.headers.get("content-length", 0)) + done
    etag = answer.headers.get("etag", "")
    if etag.startswith('"'):  # a weak one may not guard a range
        part.with_name(part.name + ".etag").write_text(etag)
    with part.open("ab" if resumed else "wb") as file, _progress(part.name.removesuffix(".part"), total) as shown:
        for chunk in answer.iter_raw():  # as it comes: a chunk size of ours would throw away what an outage cuts short
            file.write(chunk)
            done += len(chunk)
            shown(done)


def _stated_sha256(answer: httpx.Response) -> str | None:
    """The hub names a large file's sha256 in the answer that redirects to where it is stored."""
    for one in (*answer.history, answer):
        tag = one.headers.get("x-linked-etag", "").strip('"')
        if SHA256.fullmatch(tag):
            return str(tag)
    return None


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line for every tenth elsewhere."""
    if interactive():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total or None)
            yield lambda done: bar.update(task, completed=done)
        return
    shown = [-1]
    unit, name_of_unit = (2**20, "MiB") if total >= 2**20 else (2**10, "KiB")

    def line(done: int) -> None:
        percent = 100 * done // total if total else 0
        if percent // 10 > shown[0]:
            shown[0] = percent // 10
            note(f"{-(-done // unit)} of {-(-total // unit)} {name_of_unit} ({percent} %)")

    yield line


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
