"""Eviction policies on histories made by hand."""

from __future__ import annotations

import pytest

from vector_store.eviction import Held, choose, fifo, lru, utility

A = Held(id="a", seq=1, created_s=10, last_used_s=90, utility=0)
B = Held(id="b", seq=2, created_s=20, last_used_s=0, utility=30)
C = Held(id="c", seq=3, created_s=30, last_used_s=40, utility=5)
D = Held(id="d", seq=4, created_s=60, last_used_s=0, utility=0)
HISTORY = [D, B, A, C]


def test_fifo_takes_the_oldest_by_sequence_whatever_the_order_or_use() -> None:
    assert fifo(HISTORY, 2) == ["a", "b"]


def test_lru_counts_an_unused_image_from_its_insertion() -> None:
    assert lru(HISTORY, 1) == ["b", "c", "d"]


def test_utility_keeps_what_saved_most_and_takes_the_older_of_equals() -> None:
    assert utility(HISTORY, 1) == ["a", "d", "c"]


@pytest.mark.parametrize("policy", ["fifo", "lru", "utility"])
def test_nothing_leaves_while_there_is_room(policy: str) -> None:
    assert choose(HISTORY, 4, policy) == []  # type: ignore[arg-type]
    assert choose([], 1, policy) == []  # type: ignore[arg-type]


def test_equal_sequence_numbers_of_two_orchestrators_are_broken_by_id() -> None:
    twins = [Held(id=i, seq=7) for i in "zyx"]
    assert fifo(twins, 1) == ["x", "y"]
