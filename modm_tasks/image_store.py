"""Where finished images live: one folder or bucket, reached through fsspec, files named by request id.

A URI is a path inside the store, such as ``3f/3f2a...-1.png``, so a store may be moved or mounted elsewhere and every
reference stays right. Only such names are accepted: no path escapes, and on a local disk no symlink is followed.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modm_tasks.errors import InvalidInputError, NotFoundError, SourceImageError, UnavailableError

if TYPE_CHECKING:
    from PIL import Image

#: A picture with more pixels than this is refused before it is decoded (the largest side of a request, squared).
MAX_PIXELS = 4096 * 4096
#: What may be imported. The store itself holds PNG only.
FORMATS = ("PNG", "JPEG", "WEBP")
#: Text keys of ``image.info`` that are kept in the PNG: ours, none of a stranger's metadata.
OUR_PREFIX = "modm:"

_URI = re.compile(r"([0-9a-f]{2})/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-(\d{1,6})\.png")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of the store. ``modified_s`` is None where the file system does not tell."""

    uri: str
    bytes: int
    modified_s: float | None


def path_for(request_id: str, attempt: int) -> str:
    """The URI of an attempt's image. Raises InvalidInputError: id no UUID, attempt not 0 to 999999."""
    try:
        name = str(uuid.UUID(request_id))
    except ValueError:
        raise InvalidInputError(f"image id {request_id[:64]!r} is not a UUID", field="id") from None
    if not 0 <= attempt < 1_000_000:
        raise InvalidInputError(f"attempt {attempt} is not between 0 and 999999", field="attempt")
    return f"{name[:2]}/{name}-{attempt}.png"


def request_id_of(uri: str) -> str:
    """The request that an image belongs to. Raises InvalidInputError where ``uri`` is no URI of a store."""
    match = _URI.fullmatch(uri)
    if match is None or match[1] != match[2][:2]:
        raise InvalidInputError(f"not the URI of an image: {uri[:120]!r}", field="uri")
    return match[2]


def to_png(image: Image.Image) -> bytes:
    """Encode for the store. Keeps ``modm:`` text of ``image.info``; fast compression, as PNG gains little from more."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str) and key.startswith(OUR_PREFIX):
            info.add_itxt(key, value)
    out = io.BytesIO()
    image.convert("RGB").save(out, format="PNG", pnginfo=info, compress_level=1)
    return out.getvalue()


def decode_image(data: bytes, *, formats: tuple[str, ...] = FORMATS, what: str = "image") -> Image.Image:
    """Bytes to a loaded RGB image; the format is sniffed, never taken from a name.

    Raises SourceImageError: not one of ``formats``, truncated, or more than MAX_PIXELS pixels (found in the header, so
    a decompression bomb is not unpacked).
    """
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and of odd files; our own limits decide
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise SourceImageError(f"{what}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS}")
                image.load()
                info = {k: v for k, v in image.info.items() if isinstance(k, str) and k.startswith(OUR_PREFIX)}
                out = image.convert("RGB")
                out.info = dict(info.items())
                return out
    except SourceImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on garbage
        raise SourceImageError(f"{what}: not a readable {'/'.join(formats)} image ({type(error).__name__})") from error


class ImageStore:
    """Images under one fsspec URL. Thread-safe as far as the file system is; safe between processes (rename).

    On a local disk a write goes to a temporary file, is synced and renamed, so a reader never sees half an image, even
    after a power cut. Elsewhere it is one put, which object stores make atomic; on others (plain FTP, say) a reader may
    see a short file, which reads as SourceImageError.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_local = "://" not in url or url.startswith(("file://", "local://"))
        self._root = os.path.abspath(url.split("://", 1)[-1]) if self.is_local else ""

    @cached_property
    def _remote(self) -> tuple[Any, str]:
        """(file system, root path). Made at first use: it may be a network client, which must not cross a fork."""
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise UnavailableError(f"image store {self.url.split('?')[0]}: {error}") from error
        return fs, str(root).rstrip("/")

    def path_for(self, request_id: str, attempt: int) -> str:
        """See the function of this module."""
        return path_for(request_id, attempt)

    def write(self, request_id: str, attempt: int, image: Image.Image) -> tuple[str, int]:
        """Encode and store. Returns (URI, bytes). Raises UnavailableError where the store is full or away."""
        data = to_png(image)
        return self.write_atomic(path_for(request_id, attempt), data), len(data)

    def write_atomic(self, uri: str, image: Image.Image | bytes) -> str:
        """Store under ``uri``, replacing what was there. Raises UnavailableError where the store is full or away."""
        data = image if isinstance(image, bytes) else to_png(image)
        request_id_of(uri)
        try:
            if self.is_local:
                self._write_local(uri, data)
            else:
                fs, root = self._remote
                fs.makedirs(f"{root}/{uri[:2]}", exist_ok=True)
                fs.pipe_file(f"{root}/{uri}", data)
        except OSError as error:
            raise UnavailableError(f"image store: cannot write {uri}: {error.strerror or error}") from error
        return uri

    def _write_local(self, uri: str, data: bytes) -> None:
        path = self._local(uri)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".", suffix=".part")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _local(self, uri: str) -> str:
        """Absolute path. Raises InvalidInputError for a foreign URI and for a symlink on the way."""
        request_id_of(uri)
        path = os.path.join(self._root, uri)
        if os.path.islink(path) or os.path.islink(os.path.dirname(path)):
            raise InvalidInputError(f"image {uri} is a symlink; links are not followed", field="uri")
        return path

    def read_bytes(self, uri: str) -> bytes:
        """The file as stored. Raises NotFoundError where it is gone."""
        try:
            if self.is_local:
                with open(self._local(uri), "rb") as file:
                    return file.read()
            request_id_of(uri)
            fs, root = self._remote
            return bytes(fs.cat_file(f"{root}/{uri}"))
        except FileNotFoundError:
            raise NotFoundError(f"image {uri} is gone", field="uri") from None
        except OSError as error:
            raise UnavailableError(f"image store: cannot read {uri}: {error.strerror or error}") from error

    def read(self, uri: str) -> Image.Image:
        """The image, loaded, RGB. Raises SourceImageError where it is gone, foreign or unreadable."""
        try:
            data = self.read_bytes(uri)
        except (NotFoundError, InvalidInputError) as error:
            raise SourceImageError(str(error), field="uri") from error
        return decode_image(data, formats=("PNG",), what=f"image {uri}")

    def exists(self, uri: str) -> bool:
        """Whether the file is there, a regular one of our naming."""
        try:
            if self.is_local:
                return os.path.isfile(self._local(uri))
            request_id_of(uri)
            fs, root = self._remote
            return bool(fs.exists(f"{root}/{uri}"))
        except InvalidInputError:
            return False

    def delete(self, uri: str) -> bool:
        """Delete; False where it was gone already. Raises UnavailableError where the store refuses."""
        request_id_of(uri)
        try:
            if self.is_local:
                os.unlink(os.path.join(self._root, uri))  # a symlink itself goes, never what it points to
            else:
                fs, root = self._remote
                fs.rm_file(f"{root}/{uri}")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UnavailableError(f"image store: cannot delete {uri}: {error.strerror or error}") from error
        return True

    def list(self) -> Iterator[StoredFile]:
        """Every image of the store, in no order. Temporary files and names that are not ours are left out."""
        if self.is_local:
            yield from self._list_local()
            return
        fs, root = self._remote
        try:
            found = fs.find(root, detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            uri = str(path)[len(root) :].lstrip("/")
            if _URI.fullmatch(uri):
                yield StoredFile(uri=uri, bytes=int(info.get("size") or 0), modified_s=_modified_s(info))

    def _list_local(self) -> Iterator[StoredFile]:
        if not os.path.isdir(self._root):
            return
        for folder in sorted(os.listdir(self._root)):
            path = os.path.join(self._root, folder)
            if len(folder) != 2 or os.path.islink(path) or not os.path.isdir(path):
                continue
            for entry in os.scandir(path):
                uri = f"{folder}/{entry.name}"
                if _URI.fullmatch(uri) and entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    yield StoredFile(uri=uri, bytes=stat.st_size, modified_s=stat.st_mtime)

    def usage(self) -> tuple[int, int]:
        """(files, bytes). Walks the whole store."""
        files = total = 0
        for stored in self.list():
            files, total = files + 1, total + stored.bytes
        return files, total


def _modified_s(info: dict[str, Any]) -> float | None:
    for key in ("mtime", "LastModified", "last_modified", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            return float(value)
        if value is not None and hasattr(value, "timestamp"):
            return float(value.timestamp())
    return None
