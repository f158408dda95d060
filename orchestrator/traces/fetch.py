"""Downloads published metadata: resumable by HTTP range, checked, with progress."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from modm_tasks.errors import InvalidInputError, UnavailableError
from modm_tasks.output import note

HUB = "https://huggingface.co/datasets"
DATASETS = {
    "diffusiondb": f"{HUB}/poloclub/diffusiondb/resolve/main/metadata.parquet",
    "mjhq": f"{HUB}/playgroundai/MJHQ-30K/resolve/main/meta_data.json",
}
CHUNK = 1 << 20


def fetch_dataset(dataset: str, directory: Path, *, url: str | None = None, sha256: str | None = None) -> Path:
    """Download to ``directory``; returns the file. A part that is there already is gone on with.

    Raises InvalidInputError for an unknown name or a wrong checksum (the file is then removed), UnavailableError where
    the server does not give it.
    """
    if dataset not in DATASETS:
        raise InvalidInputError(f"unknown dataset {dataset!r}; there are {', '.join(DATASETS)}", field="dataset")
    source = url or DATASETS[dataset]
    target = directory / f"{dataset}-{Path(source).name}"
    directory.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        part = target.with_name(target.name + ".part")
        _download(source, part)
        os.replace(part, target)
    digest = file_sha256(target)
    if sha256 is not None and digest != sha256.lower():
        target.unlink()
        raise InvalidInputError(f"{target.name}: sha256 is {digest}, not {sha256}; removed", field="sha256")
    note(f"sha256 {digest}")
    return target


def _download(url: str, part: Path) -> None:
    import httpx

    have = part.stat().st_size if part.exists() else 0
    headers = {"range": f"bytes={have}-"} if have else {}
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=60) as answer:
            if answer.status_code == 416:
                return  # the part is the whole
            answer.raise_for_status()
            resumed = answer.status_code == 206
            total = int(answer.headers.get("content-length", 0)) + (have if resumed else 0)
            done = have if resumed else 0
            shown = -1
            with part.open("ab" if resumed else "wb") as file:
                for chunk in answer.iter_bytes(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    percent = 100 * done // total if total else 0
                    if percent // 10 > shown:
                        shown = percent // 10
                        note(f"{done // 2**20} of {total // 2**20} MiB ({percent} %)")
    except httpx.HTTPError as error:
        raise UnavailableError(f"cannot fetch {url}: {error}; run it again to go on", field="url") from error


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
