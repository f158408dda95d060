"""Whether an installed package is as its publisher made it."""

from __future__ import annotations

import base64
import csv
import hashlib
from importlib.metadata import distribution
from pathlib import Path


def altered_files(name: str) -> list[str]:
    """Python files of an installed package that differ from the hashes in its own RECORD, or are gone."""
    package = distribution(name)
    record = package.read_text("RECORD")
    assert record is not None, f"{name} was installed without a RECORD"
    rows = [row for row in csv.reader(record.splitlines()) if row[0].endswith(".py") and row[1]]
    assert len(rows) > 100, f"{name}: only {len(rows)} files in its RECORD"
    return [file for file, digest, _ in rows if digest != _digest(Path(str(package.locate_file(file))))]


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
