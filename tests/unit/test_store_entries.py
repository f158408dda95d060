"""A cache entry to its payload and back."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from modm_tasks.errors import InvalidInputError
from vector_store.entries import ImageEntry, entry_of

PLAIN = ImageEntry(id="i", prompt="a cat", model="m", seed=1, size="8x8", depth=0, created_s=2.0, uri="a/i.png")
FULL = replace(
    PLAIN, depth=2, client="c", source_id="s", skipped_steps=20, hits=3, last_used_s=9.0, utility=45.0,
    hits_by_k={"15": 3}, hit_age_sum_s=4.5, ancestors=("r", "s"), similarity=0.31, bytes=7,
)  # fmt: skip


@pytest.mark.parametrize("entry", [PLAIN, FULL])
def test_a_payload_gives_the_entry_back(entry: ImageEntry) -> None:
    again = entry_of("i", entry.payload())
    assert again == entry
    assert again.as_json() == entry.as_json()
    assert isinstance(again.ancestors, tuple)
    assert entry_of("i", entry.payload(), similarity=0.5) == replace(entry, similarity=0.5)


def test_of_an_earlier_or_later_version_the_rest_is_read() -> None:
    payload = PLAIN.payload()
    for name in ("hits_by_k", "ancestors", "bytes", "namespace"):
        del payload[name]
    again = entry_of("i", payload | {"mood": "good"})
    assert again == PLAIN
    assert again.payload() == PLAIN.payload()
    again.hits_by_k["15"] = 1  # type: ignore[index]
    assert entry_of("i", payload).hits_by_k == {}, "two entries share one table"


def test_what_is_missing_is_named() -> None:
    payload = PLAIN.payload()
    del payload["prompt"]
    with pytest.raises(InvalidInputError, match="cache entry i: no prompt") as refused:
        entry_of("i", payload)
    assert refused.value.field == "prompt"


def test_an_entry_that_was_read_is_as_frozen_as_any() -> None:
    with pytest.raises(FrozenInstanceError):
        entry_of("i", FULL.payload()).hits = 4  # type: ignore[misc]
