"""Cache and image files agree again at an orchestrator's start, on both backends."""

from __future__ import annotations

import threading
import time

import pytest

from modm_tasks.ledger import Ledger
from orchestrator.reconcile import REST, WORK_S, Pace, reconcile
from tests.support.cache import put
from vector_store.cache import ImageCache


def test_cache_and_files_agree_again_at_start_but_an_absent_store_empties_nothing(
    ledger: Ledger, cache: ImageCache
) -> None:
    entries, end = [put(cache, n) for n in range(20)], threading.Event()
    found = reconcile(cache, ledger, end)
    assert found is not None
    assert found.clean
    for entry in entries[:3]:
        cache.images.delete(entry.uri)
    mended = reconcile(cache, ledger, end)
    assert mended is not None
    assert mended.repaired == 3
    assert cache.count() == 17
    for entry in entries[3:]:
        cache.images.delete(entry.uri)
    kept = reconcile(cache, ledger, end)
    assert kept is not None
    assert (kept.repaired, len(kept.vectors_without_file), cache.count()) == (0, 17, 17)


def test_a_stop_ends_the_walk_and_leaves_the_cache_as_it_is(
    ledger: Ledger, cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.reconcile.WORK_S", 0.0)  # it rests after every image
    for n in range(5):
        cache.images.delete(put(cache, n).uri)
    end = threading.Event()
    end.set()
    assert reconcile(cache, ledger, end) is None
    assert cache.count() == 5


def test_the_walk_rests_nine_times_as_long_as_it_works() -> None:
    pace = Pace(threading.Event())
    began = time.thread_time(), time.monotonic()
    while (worked_s := time.thread_time() - began[0]) < 10 * WORK_S:
        pace()
    rests = time.monotonic() - began[1] - worked_s
    assert rests > REST / 2 * worked_s
