"""What the cache knows of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from modm_tasks.errors import InvalidInputError

PAYLOAD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """A cached image. Times are Unix seconds.

    ``seq`` is the order of insertion within a namespace; the cache assigns it. ``utility`` is NIRVANA's f*k: the
    steps that uses of this image have saved so far; ``hits_by_k`` counts them by steps skipped and ``hit_age_sum_s``
    adds up the image's age at each. ``depth`` counts refinements: 0 = drawn by the large model from noise, d+1 =
    refined from an image of depth d. ``parameters`` is what was asked for beside prompt and seed, "" for nothing: the
    image answers an exact repeat only where that agrees. ``ancestors`` are the images it descends from, nearest last,
    so that a purge reaches it also when those between have been evicted.
    """

    id: str
    prompt: str
    model: str
    seed: int
    size: str
    depth: int
    created_s: float
    uri: str
    client: str = ""
    namespace: str = "default"
    seq: int = 0
    source_id: str | None = None
    skipped_steps: int = 0
    parameters: str = ""
    hits: int = 0
    last_used_s: float = 0.0
    utility: float = 0.0
    hits_by_k: Mapping[str, int] = field(default_factory=dict)
    hit_age_sum_s: float = 0.0
    ancestors: tuple[str, ...] = ()
    similarity: float | None = None
    bytes: int = 0

    def payload(self) -> dict[str, Any]:
        """For the vector store: flat JSON, without the id, which is the point's own."""
        values = asdict(self)
        del values["id"]
        values["ancestors"] = list(self.ancestors)
        return values | {"v": PAYLOAD_VERSION}

    def as_json(self) -> dict[str, Any]:
        """For people and files: every field."""
        return asdict(self)


_FIELDS = frozenset(f.name for f in fields(ImageEntry)) - {"id"}


def entry_of(entry_id: str, payload: Mapping[str, Any], *, similarity: float | None = None) -> ImageEntry:
    """Back from a payload; fields of a later version are left out. Raises InvalidInputError naming a missing one."""
    known = {k: v for k, v in payload.items() if k in _FIELDS}
    if similarity is not None:
        known["similarity"] = similarity
    if "ancestors" in known:
        known["ancestors"] = tuple(known["ancestors"])
    try:
        return ImageEntry(id=entry_id, **known)
    except TypeError as error:
        raise InvalidInputError(f"cache entry {entry_id}: {str(error).split(') ')[-1]}") from error


@dataclass(frozen=True, kw_only=True)
class Match:
    """A search result. ``similarity`` is cosine, clamped at 0 (paper section 5.1, equation 1)."""

    entry: ImageEntry
    similarity: float
