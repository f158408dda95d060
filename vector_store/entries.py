"""What the cache knows of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from modm_tasks.errors import InvalidInputError

PAYLOAD_VERSION = 1
#: Fields that a use changes.
USE_FIELDS = ("hits", "last_used_s", "utility", "hits_by_k", "hit_age_sum_s")


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

    def used(self, use: Use) -> ImageEntry:
        """After that use: ``lru``, ``utility`` and the statistics go by these fields."""
        k = str(use.skipped_steps)
        return replace(
            self,
            hits=self.hits + 1,
            last_used_s=max(self.last_used_s, use.at_s),
            utility=self.utility + use.skipped_steps,
            hits_by_k={**self.hits_by_k, k: self.hits_by_k.get(k, 0) + 1},
            hit_age_sum_s=self.hit_age_sum_s + max(0.0, use.at_s - self.created_s),
        )

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
_REQUIRED = [
    f.name for f in fields(ImageEntry) if f.default is MISSING and f.default_factory is MISSING and f.name != "id"
]


def entry_of(entry_id: str, payload: Mapping[str, Any], *, similarity: float | None = None) -> ImageEntry:
    """Back from a payload; fields of a later version are left out. Raises InvalidInputError naming a missing one."""
    known = {k: v for k, v in payload.items() if k in _FIELDS}
    if len(known) < len(_FIELDS):
        if missing := [name for name in _REQUIRED if name not in known]:
            raise InvalidInputError(f"cache entry {entry_id}: no {missing[0]}", field=missing[0])
        known = {"hits_by_k": {}} | known
    known["id"] = entry_id
    if similarity is not None:
        known["similarity"] = similarity
    known["ancestors"] = tuple(known.get("ancestors", ()))
    # As a copy is made: a frozen class sets its fields one by one, which a dozen results a search would pay for.
    entry = object.__new__(ImageEntry)
    entry.__dict__.update(known)
    return entry


@dataclass(frozen=True, kw_only=True)
class Use:
    """An image was taken as a source at ``at_s``, Unix seconds, or was itself the answer."""

    id: str
    namespace: str
    at_s: float
    skipped_steps: int


@dataclass(frozen=True, kw_only=True)
class Match:
    """A search result. ``similarity`` is cosine, clamped at 0 (paper section 5.1, equation 1)."""

    entry: ImageEntry
    similarity: float
