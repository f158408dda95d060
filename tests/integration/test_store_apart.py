"""The embedded store in a process of its own: what happens when either process ends, and that answers find their questions.

That it keeps the contract of a vector store is tested with all others in `test_store_backends.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from modm_tasks.errors import NotFoundError, StoreInUseError, UnavailableError
from vector_store.backends import Point
from vector_store.backends.apart import ApartBackend
from vector_store.backends.edge import SCROLL_BATCH, EdgeBackend
from vector_store.embedder import Vector, unit_rows

NAME, DIM = "images_test_a", 16
ROWS = unit_rows(np.random.default_rng(0).standard_normal((2 * SCROLL_BATCH + 9, DIM)))


def uid(n: int) -> str:
    return str(uuid.UUID(int=n + 1))


def point(n: int, vector: Vector | None = None) -> Point:
    return Point(id=uid(n), vector=ROWS[n] if vector is None else vector, payload={"seq": n})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ApartBackend]:
    made = ApartBackend(tmp_path / "vectors")
    made.create(NAME, DIM)
    yield made
    made.close()


def process(store: ApartBackend) -> subprocess.Popen[bytes]:
    assert store._process is not None
    return store._process


def test_a_killed_process_is_one_refusal_and_nothing_is_lost(store: ApartBackend) -> None:
    store.upsert(NAME, [point(n) for n in range(40)])
    first = process(store)
    first.kill()
    first.wait(10)
    with pytest.raises(UnavailableError, match="process has ended"):
        store.count(NAME)
    assert store.count(NAME) == 40
    assert process(store).pid != first.pid
    assert store.search(NAME, ROWS[7])[0].id == uid(7)


def test_signals_to_the_whole_group_leave_it_to_its_owner(store: ApartBackend) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        process(store).send_signal(number)
    store.upsert(NAME, [point(1)])
    assert store.count(NAME) == 1
    child = process(store)
    store.close()
    assert child.returncode == 0
    with pytest.raises(UnavailableError, match="closed"):
        store.count(NAME)


def test_all_pages_come(store: ApartBackend) -> None:
    store.upsert(NAME, [point(n) for n in range(len(ROWS))])
    assert {p.id for p in store.scroll(NAME, only=("seq",))} == {uid(n) for n in range(len(ROWS))}
    withs = {p.id: p.vector for p in store.scroll(NAME, with_vectors=True)}
    assert np.allclose([withs[uid(n)] for n in range(len(ROWS))], ROWS, atol=1e-6)


def test_every_thread_gets_its_own_answer(store: ApartBackend) -> None:
    store.upsert(NAME, [point(n) for n in range(200)])

    def ask(n: int) -> bool:
        if n % 10 == 9:
            with pytest.raises(NotFoundError, match=f"no_{n}"):
                store.count(f"no_{n}")
        return store.search(NAME, ROWS[n])[0].id == uid(n) and store.get(NAME, [uid(n)])[0].payload == {"seq": n}

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_what_the_engine_did_not_expect_is_one_clear_error_and_it_goes_on(store: ApartBackend) -> None:
    with pytest.raises(UnavailableError, match="failed at extremes"):
        store.extremes(NAME, "prompt", limit=1)
    with pytest.raises(UnavailableError, match="failed at upsert"):
        store.upsert(NAME, [3])  # type: ignore[list-item]
    assert store.count(NAME) == 0


def test_others_are_told_of_the_owner_not_of_its_helper(store: ApartBackend, tmp_path: Path) -> None:
    with pytest.raises(StoreInUseError, match=f"process {os.getpid()} "):
        EdgeBackend(tmp_path / "vectors")
    with pytest.raises(StoreInUseError, match=f"process {os.getpid()} "):
        ApartBackend(tmp_path / "vectors")
    assert json.loads((tmp_path / "vectors" / "holder.json").read_text())["pid"] == os.getpid() != process(store).pid


def test_a_killed_owner_leaves_the_store_to_the_next(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vector_store.backends.apart import ApartBackend\n"
        f"store = ApartBackend(Path({str(tmp_path / 'vectors')!r})); store.create({NAME!r}, {DIM})\n"
        "print(store._process.pid, flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        helper = int(owner.stdout.readline())
        os.kill(helper, signal.SIGSTOP)  # as one in a long call: it cannot let go at once
        owner.kill()
        owner.wait(10)
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(ApartBackend, tmp_path / "vectors")
            with pytest.raises(TimeoutError):
                opening.result(0.5)
            os.kill(helper, signal.SIGCONT)
            following = opening.result(20)
    assert following.collections() == [NAME]
    following.close()


def test_a_store_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "vectors").write_text("a file where the folder should be")
    with pytest.raises(UnavailableError, match=r"cannot be opened: .*vectors") as refused:
        ApartBackend(tmp_path / "vectors")
    assert "\n" not in str(refused.value)
