"""A folder of images and captions, as a list of what to import. Imports nothing heavy: the CLI reads folders with it.

A caption comes from, in this order: the folder's ``captions.jsonl`` (one object a line: ``file``, ``prompt``, and if
known ``seed`` and ``model``), a ``.txt`` beside the image, or the file's name (``a_red-cat.png`` is "a red cat", as
the images that the MoDM reference generates beforehand are named).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from modm_tasks.errors import InvalidInputError, NotFoundError
from modm_tasks.messages import MAX_PROMPT_CHARS

T = TypeVar("T")

CAPTIONS = "captions.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
#: A file larger than this is not read at all.
MAX_FILE_BYTES = 64 * 2**20
MAX_CAPTION_BYTES = 256 * 2**10
BATCH = 32
_NAMESPACE = uuid.UUID("6b0f3f0e-53f5-5a1e-9d3c-5d5a1f0f7d11")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image to import. ``file`` is its path inside the folder, with forward slashes."""

    file: str
    prompt: str
    seed: int | None = None
    model: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"file": self.file, "prompt": self.prompt, "seed": self.seed, "model": self.model}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A file that is not imported, and why. Never fatal."""

    file: str
    reason: str


def item_id(namespace: str, file: str, data: bytes) -> str:
    """The image's id: a UUIDv5 of namespace, path and content, so that a second run finds what the first has done."""
    return str(uuid.uuid5(_NAMESPACE, f"{namespace}\0{file}\0{hashlib.sha256(data).hexdigest()}"))


def scan(folder: Path) -> tuple[list[Item], list[Problem]]:
    """All images of a folder and below, by path, and what is wrong with others. Opens no image.

    Symlinks, to files and to folders, are refused and listed. Raises NotFoundError where there is no folder.
    """
    if not folder.is_dir():
        raise NotFoundError(f"no folder {folder}", field="folder")
    problems: list[Problem] = []
    captions = _captions(folder, problems)
    items: list[Item] = []
    found: set[str] = set()
    for file in _files(folder, problems):
        found.add(file)
        item = captions.get(file)
        if item is None:
            prompt, problem = _beside(folder, file)
            item = Item(file=file, prompt=prompt)
        else:
            problem = ""
        problem = problem or check_prompt(item.prompt)
        if problem:
            problems.append(Problem(file=file, reason=problem))
        else:
            items.append(item)
    listed = {p.file for p in problems}
    problems += [Problem(file=f, reason="no such image") for f in captions if f not in found and f not in listed]
    return items, problems


def _files(folder: Path, problems: list[Problem]) -> Iterator[str]:
    for where, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for name in [*folders]:
            if os.path.islink(os.path.join(where, name)):
                folders.remove(name)
                problems.append(Problem(file=_inside(folder, where, name), reason="a symlink; links are not followed"))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            path, file = os.path.join(where, name), _inside(folder, where, name)
            if os.path.islink(path):
                problems.append(Problem(file=file, reason="a symlink; links are not followed"))
            elif not os.path.isfile(path):
                problems.append(Problem(file=file, reason="not a regular file"))
            elif os.path.getsize(path) > MAX_FILE_BYTES:
                problems.append(Problem(file=file, reason=f"larger than {MAX_FILE_BYTES // 2**20} MiB"))
            elif reason := check_file(file):
                problems.append(Problem(file=file, reason=reason))
            else:
                yield file


def _inside(folder: Path, where: str, name: str) -> str:
    return PurePosixPath(os.path.relpath(os.path.join(where, name), folder).replace(os.sep, "/")).as_posix()


def check_file(file: str) -> str:
    """Why this cannot be a path inside a folder; empty when it can."""
    try:
        file.encode()
    except UnicodeEncodeError:
        return "the name is not valid Unicode"
    path = PurePosixPath(file)
    if not file or len(file) > 1000 or path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
        return "not a path inside the folder"
    return ""


def check_prompt(prompt: str) -> str:
    """Why this cannot be a prompt; empty when it can."""
    if not prompt.strip():
        return "the caption is empty"
    if len(prompt) > MAX_PROMPT_CHARS:
        return f"the caption has {len(prompt)} characters; the limit is {MAX_PROMPT_CHARS}"
    if any(ord(c) < 32 and c not in "\n\t\r" for c in prompt) or any("\ud800" <= c <= "\udfff" for c in prompt):
        return "the caption holds control characters"
    return ""


def _captions(folder: Path, problems: list[Problem]) -> dict[str, Item]:
    path = folder / CAPTIONS
    if path.is_symlink():
        problems.append(Problem(file=CAPTIONS, reason="a symlink; links are not followed"))
        return {}
    if not path.is_file():
        return {}
    found: dict[str, Item] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = item_of(json.loads(line))
            except (ValueError, InvalidInputError) as error:
                reason = str(error) if isinstance(error, InvalidInputError) else "not a JSON object in UTF-8"
                problems.append(Problem(file=f"{CAPTIONS}, line {number}", reason=reason))
                continue
            found[item.file] = item
    return found


def item_of(row: object) -> Item:
    """A caption row to an item. Raises InvalidInputError that names the field."""
    if not isinstance(row, dict):
        raise InvalidInputError("not a JSON object")
    file, prompt, seed, model = row.get("file"), row.get("prompt"), row.get("seed"), row.get("model") or ""
    if not isinstance(file, str) or check_file(file):
        raise InvalidInputError("field 'file' is not a path inside the folder", field="file")
    if not isinstance(prompt, str) or check_prompt(prompt):
        why = check_prompt(prompt) if isinstance(prompt, str) else "not text"
        raise InvalidInputError(f"field 'prompt': {why}", field="prompt")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise InvalidInputError("field 'seed' is not a whole number from 0 to 2^63-1", field="seed")
    if not isinstance(model, str) or len(model) > 128:
        raise InvalidInputError("field 'model' is not a text of at most 128 characters", field="model")
    return Item(file=PurePosixPath(file).as_posix(), prompt=prompt, seed=seed, model=model)


def _beside(folder: Path, file: str) -> tuple[str, str]:
    """(caption, problem) from the .txt beside an image, or from its name."""
    text = (folder / file).with_suffix(".txt")
    if text.is_symlink():
        return "", "its .txt is a symlink; links are not followed"
    if not text.is_file():
        return re.sub(r"[_\-\s]+", " ", PurePosixPath(file).stem).strip(), ""
    if text.stat().st_size > MAX_CAPTION_BYTES:
        return "", f"its .txt is larger than {MAX_CAPTION_BYTES // 2**10} KiB"
    try:
        return text.read_text(encoding="utf-8").strip(), ""
    except (OSError, UnicodeDecodeError):
        return "", "its .txt is not readable UTF-8"


def read_item(folder: Path, file: str) -> bytes:
    """An image's bytes. Raises NotFoundError where it has gone or changed into a link, or may not be read."""
    try:
        fd = os.open(folder / file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(fd, "rb") as opened:
            return opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"{file}: {error.strerror or error}", field="file") from error


def batches(items: Sequence[T], size: int = BATCH) -> Iterator[Sequence[T]]:
    """Runs of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
