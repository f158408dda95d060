"""Codes of the embedded engine: which, when they are built, what tidying leaves, and that they find the nearest."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from modm_tasks.errors import UnavailableError
from tests.support.cache import uid
from tests.support.stores import open_store
from vector_store.backends import Point, codes_for
from vector_store.embedder import unit_rows

NAME = "images_test_codes"


@pytest.mark.parametrize(
    ("setting", "capacity", "codes"),
    [("auto", 2_000, "none"), ("auto", 10_000, "int8"), ("auto", 200_001, "binary"), ("none", 10**6, "none")],
)
def test_codes_follow_the_capacity(setting: Literal["auto", "none"], capacity: int, codes: str) -> None:
    assert codes_for(setting, capacity) == codes


@pytest.mark.parametrize("later", ["edge-int8", "edge-binary"])
def test_a_store_made_without_codes_opens_with_them(later: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = unit_rows(rng.standard_normal((5000, 256)))
    before = open_store("edge", tmp_path)
    before.create(NAME, 256)
    before.upsert(NAME, [Point(id=uid(i), vector=row, payload={"seq": i}) for i, row in enumerate(rows)])
    before.close()
    after = open_store(later, tmp_path)
    assert after.tidy(NAME)
    assert [after.search(NAME, row)[0].id for row in rows[::500]] == [uid(i) for i in range(0, 5000, 500)]
    assert after.count(NAME) == 5000
    after.close()


def test_tidying_leaves_no_files_behind_and_searches_go_on_meanwhile(tmp_path: Path) -> None:
    """The engine itself keeps the files of replaced segments for as long as a collection is open."""
    rows = unit_rows(np.random.default_rng(7).standard_normal((9000, 256)))
    backend = open_store("edge-binary", tmp_path)
    backend.create(NAME, 256)
    ended, wrong, asked = threading.Event(), [], 0
    backend.upsert(NAME, [Point(id=uid(0), vector=rows[0], payload={"seq": 0})])

    def search() -> None:
        nonlocal asked
        while not ended.is_set():
            try:
                found = backend.search(NAME, rows[0])[0].id
            except UnavailableError as error:
                found = str(error)
            wrong.extend([found] if found != uid(0) else [])
            asked += 1

    thread = threading.Thread(target=search)
    thread.start()
    try:
        for start in range(0, 9000, 1500):
            part = range(start, start + 1500)
            backend.upsert(NAME, [Point(id=uid(i), vector=rows[i], payload={"seq": i}) for i in part])
            backend.tidy(NAME)
        size = backend.disk_bytes() or 0
    finally:
        ended.set()
        thread.join()
    assert not wrong
    assert asked > 6
    assert backend.count(NAME) == 9000
    backend.close()
    reopened = open_store("edge-binary", tmp_path)
    reopened.count(NAME)  # opens the collection
    assert size <= (reopened.disk_bytes() or 0) * 1.25
    reopened.close()


@pytest.mark.parametrize("codes", ["int8", "binary"])
def test_codes_find_what_exact_search_finds(codes: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = unit_rows(rng.standard_normal((2_200, 512)))
    backend = open_store(f"edge-{codes}", tmp_path)
    backend.create(NAME, 512)
    backend.upsert(NAME, [Point(id=uid(i), vector=row, payload={"seq": i}) for i, row in enumerate(rows)])
    assert backend.tidy(NAME)
    queries = unit_rows(rows[:50] + 0.05 * rng.standard_normal((50, 512)))
    for i, query in enumerate(queries):
        (found,) = backend.search(NAME, query)
        assert found.id == uid(i)
        assert found.score == pytest.approx(float(rows[i] @ query), abs=1e-4)
    backend.close()
