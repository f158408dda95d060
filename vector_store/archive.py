"""Export (images with captions, for people and for `import`) and snapshot (the cache itself, to be restored).

A snapshot is one plain tar: ``images/...``, per namespace ``entries.jsonl`` and ``vectors.npy`` row for row, then
``manifest.json``, and last ``SHA256SUMS`` of everything before it, so that a cut-off file is noticed. Vectors and
images are one unit: entries are written after the images that could be read, so an image evicted meanwhile is in
neither.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from modm_tasks.errors import ConflictError, InvalidInputError, ModmError, NotFoundError
from vector_store.cache import ImageCache
from vector_store.embedder import Vector
from vector_store.entries import ImageEntry, entry_of
from vector_store.folder import CAPTIONS

FORMAT = 1
SUMS = "SHA256SUMS"
_NAME = re.compile(
    r"images/[0-9a-f]{2}/[0-9a-f-]{36}-\d{1,6}\.png|[a-z0-9][a-z0-9_-]{0,47}/(?:entries\.jsonl|vectors\.npy)|manifest\.json"
)
_MAX_MEMBER_BYTES = 16 * 2**30


def tar_stream(members: Iterator[tuple[str, bytes]]) -> Iterator[bytes]:
    """A tar of regular files, piece by piece; nothing is held but the member at hand."""
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        yield info.tobuf(format=tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)
    yield bytes(2 * 512)


def export_stream(cache: ImageCache, namespace: str) -> Iterator[bytes]:
    """A tar of ``{id}.png`` and ``captions.jsonl``; unpacked, it is a folder that `import` takes."""

    def members() -> Iterator[tuple[str, bytes]]:
        rows: list[str] = []
        for entry in sorted(cache.iterate(namespace), key=lambda e: e.seq):
            try:
                data = cache.images.read_bytes(entry.uri)
            except NotFoundError:
                continue
            name = f"{entry.id}.png"
            rows.append(json.dumps({"file": name, **_caption(entry)}, ensure_ascii=False))
            yield name, data
        yield CAPTIONS, "".join(f"{row}\n" for row in rows).encode()

    return tar_stream(members())


def _caption(entry: ImageEntry) -> dict[str, Any]:
    return {"prompt": entry.prompt, "seed": entry.seed, "model": entry.model, "size": entry.size, "depth": entry.depth}


def snapshot_stream(cache: ImageCache, namespaces: list[str] | None = None) -> Iterator[bytes]:
    """The snapshot, piece by piece. Holds one namespace's vectors in memory (3 GB for a million of 768 dimensions)."""

    def plain() -> Iterator[tuple[str, bytes]]:
        counts: dict[str, int] = {}
        for namespace in cache.namespaces() if namespaces is None else namespaces:
            held = _held(cache, namespace)
            kept: list[tuple[ImageEntry, Vector]] = []
            for entry, vector in held:
                try:
                    data = cache.images.read_bytes(entry.uri)
                except NotFoundError:
                    continue
                kept.append((entry, vector))
                yield f"images/{entry.uri}", data
            rows = "".join(json.dumps(e.as_json(), ensure_ascii=False) + "\n" for e, _ in kept)
            yield f"{namespace}/entries.jsonl", rows.encode()
            buffer = io.BytesIO()
            matrix = np.asarray([v for _, v in kept], dtype="<f4").reshape(len(kept), cache.dim)
            np.save(buffer, matrix, allow_pickle=False)
            yield f"{namespace}/vectors.npy", buffer.getvalue()
            counts[namespace] = len(kept)
        manifest = {"format": FORMAT, "embedder": cache.embedder_identity, "dim": cache.dim, "images": counts}
        yield "manifest.json", json.dumps(manifest | {"made_s": time.time()}).encode()

    def summed() -> Iterator[tuple[str, bytes]]:
        sums: list[str] = []
        for name, data in plain():
            sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
            yield name, data
        yield SUMS, "".join(sums).encode()

    return tar_stream(summed())


def _held(cache: ImageCache, namespace: str) -> list[tuple[ImageEntry, Vector]]:
    held: list[tuple[ImageEntry, Vector]] = []
    with cache.lock:
        try:
            for point in cache.backend.scroll(cache.name(namespace), with_vectors=True):
                if point.vector is not None:
                    held.append((entry_of(point.id, point.payload), point.vector))
        except NotFoundError:
            return []
    return sorted(held, key=lambda pair: pair[0].seq)


def restore(
    cache: ImageCache,
    file: Path | IO[bytes],
    *,
    replace: bool = False,
    scratch: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Read a snapshot back. Returns images per namespace.

    Everything is unpacked beside and checked first (names, checksums, counts, dimension), so a broken file changes
    nothing. ``replace`` empties the namespaces before; else images are added to what is there, and those of the same id
    replaced. Raises InvalidInputError for a broken file, ConflictError for one of another embedder.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="restore-") as folder:
        root = Path(folder)
        _unpack(file, root)
        manifest = _manifest(root, cache)
        sections = {ns: _section(root, ns, int(n), cache.dim) for ns, n in manifest["images"].items()}
        for namespace, (entries, vectors) in sections.items():
            if replace:
                cache.clear(namespace)
            for start in range(0, len(entries), 64):
                part = entries[start : start + 64]
                for entry in part:
                    cache.images.write_atomic(entry.uri, (root / "images" / entry.uri).read_bytes())
                cache.put_raw(namespace, part, list(vectors[start : start + 64]))
                if progress is not None:
                    progress(len(part))
        return {ns: len(entries) for ns, (entries, _) in sections.items()}


def check(file: Path) -> int:
    """Read a snapshot and compare its checksums; returns the number of members. Raises InvalidInputError."""
    return _unpack(file, None)


def _unpack(file: Path | IO[bytes], root: Path | None) -> int:
    """Write members to disk (if ``root``), refusing every name but our own, and compare the checksums."""
    sums: dict[str, str] = {}
    stated: dict[str, str] | None = None
    try:
        with tarfile.open(file, "r:") if isinstance(file, Path) else tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if stated is not None:
                    raise InvalidInputError(f"snapshot: {member.name[:80]!r} comes after {SUMS}")
                data = tar.extractfile(member) if member.isreg() and member.size <= _MAX_MEMBER_BYTES else None
                if data is None:
                    raise InvalidInputError(f"snapshot: {member.name[:80]!r} is not a regular file of a legal size")
                if member.name == SUMS:
                    stated = _read_sums(data.read())
                    continue
                if not _NAME.fullmatch(member.name) or member.name in sums:
                    raise InvalidInputError(f"snapshot: {member.name[:80]!r} does not belong in a snapshot")
                sums[member.name] = _copy(data, root / member.name if root else None)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InvalidInputError(f"snapshot: not a readable tar: {error}", field="file") from error
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {error.filename}", field="file") from error
    if stated is None:
        raise InvalidInputError("snapshot: cut off, its checksums are missing", field="file")
    if wrong := sorted(name for name in stated.keys() | sums.keys() if stated.get(name) != sums.get(name)):
        raise InvalidInputError(f"snapshot: checksum of {wrong[0]} does not match ({len(wrong)} in all)", field="file")
    return len(sums)


def _copy(data: IO[bytes], path: Path | None) -> str:
    digest = hashlib.sha256()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") if path is not None else open(os.devnull, "wb") as out:
        while piece := data.read(2**20):
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def _read_sums(data: bytes) -> dict[str, str]:
    lines = [line.split("  ", 1) for line in data.decode().splitlines()]
    return {name: digest for digest, name in lines}


def _manifest(root: Path, cache: ImageCache) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        form, images, embedder, dim = (manifest[k] for k in ("format", "images", "embedder", "dim"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"snapshot: no usable manifest ({error})", field="file") from error
    if form != FORMAT or not isinstance(images, dict):
        raise InvalidInputError(f"snapshot: format {form!r}; this version reads {FORMAT}", field="file")
    if embedder != cache.embedder_identity or dim != cache.dim:
        raise ConflictError(
            f"the snapshot is of embedder {embedder}, the cache of {cache.embedder_identity}; "
            "restore it under that embedder, then run `modm cache reindex`",
            field="embedder",
        )
    return manifest


def _section(root: Path, namespace: str, count: int, dim: int) -> tuple[list[ImageEntry], Vector]:
    try:
        lines = (root / namespace / "entries.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [entry_of(str(row["id"]), row | {"namespace": namespace}) for row in map(json.loads, lines)]
        vectors = np.load(root / namespace / "vectors.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, ModmError) as error:
        raise InvalidInputError(f"snapshot: namespace {namespace}: {error}", field="file") from error
    if len(entries) != count or vectors.shape != (count, dim) or not np.isfinite(vectors).all():
        raise InvalidInputError(f"snapshot: namespace {namespace}: not {count} entries with {dim} dimensions")
    for entry in entries:
        if not os.path.isfile(root / "images" / entry.uri):
            raise InvalidInputError(f"snapshot: image {entry.uri} is missing", field="file")
    return entries, np.asarray(vectors, dtype=np.float32)


def unpack_export(file: Path, folder: Path) -> int:
    """Unpack what `export_stream` made into ``folder``, a new or empty one. Returns the number of images."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InvalidInputError(f"folder {folder} is not empty", field="folder")
    images = 0
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            data = tar.extractfile(member) if member.isreg() else None
            if data is None or not re.fullmatch(rf"[0-9a-f-]{{36}}\.png|{re.escape(CAPTIONS)}", member.name):
                raise InvalidInputError(f"export: unexpected member {member.name[:80]!r}")
            _copy(data, folder / member.name)
            images += member.name.endswith(".png")
    return images
