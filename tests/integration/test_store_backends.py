"""The contract of every vector store. The Qdrant server's part runs when MODM_TEST_QDRANT_URL is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr

from modm_tasks.errors import (
    ConfigError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    StoreInUseError,
    UnavailableError,
)
from modm_tasks.settings import Settings
from tests.support.stores import SERVER, open_store
from vector_store.backends import Filter, Point, VectorBackend, open_backend
from vector_store.embedder import Vector, unit_rows

KINDS = ["edge", "edge-int8", "edge-binary", "apart-int8", "memory", "local", *(["server"] if SERVER else [])]
DIM = 16
NAME = f"images_test-{uuid.uuid4().hex[:8]}_a"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(kind: str, tmp_path: Path) -> Iterator[VectorBackend]:
    opened = open_store(kind, tmp_path)
    opened.create(NAME, DIM)
    yield opened
    for name in (NAME, NAME + "2"):
        opened.drop(name)
    opened.close()


def uid(n: int) -> str:
    return str(uuid.UUID(int=n + 1))


def vectors(n: int, seed: int = 0) -> Vector:
    return unit_rows(np.random.default_rng(seed).standard_normal((n, DIM)))


def points(n: int, start: int = 0) -> list[Point]:
    rows = vectors(start + n)
    return [
        Point(
            id=uid(i),
            vector=rows[i],
            payload={"seq": i, "depth": i % 3, "client": f"c{i % 2}", "size": "64x64", "prompt": "ünï", "none": None},
        )
        for i in range(start, start + n)
    ]


def test_the_nearest_come_first_with_exact_cosines(store: VectorBackend) -> None:
    store.upsert(NAME, points(30))
    query = vectors(1, seed=5)[0]
    exact = vectors(30) @ query
    found = store.search(NAME, query, limit=5)
    assert [f.id for f in found] == [uid(int(i)) for i in np.argsort(-exact)[:5]]
    assert np.allclose([f.score for f in found], np.sort(exact)[::-1][:5], atol=1e-5)
    assert found[0].payload["prompt"] == "ünï"


def test_filters_hold_together(store: VectorBackend) -> None:
    store.upsert(NAME, points(30))
    where = Filter(equals={"client": "c1", "size": "64x64"}, at_most={"depth": 1}, not_ids=(uid(1), uid(3)))
    found = store.search(NAME, vectors(1)[0], limit=30, where=where)
    wanted = {uid(i) for i in range(30) if i % 2 == 1 and i % 3 <= 1 and i not in (1, 3)}
    assert {f.id for f in found} == wanted
    assert store.count(NAME, Filter(equals={"client": "c1"})) == 15
    assert {p.id for p in store.scroll(NAME, where=Filter(at_most={"depth": 0}))} == {uid(i) for i in range(0, 30, 3)}


def test_an_upsert_replaces_and_payloads_merge(store: VectorBackend) -> None:
    store.upsert(NAME, points(3))
    store.upsert(NAME, points(3))
    store.set_payloads(NAME, {uid(1): {"hits": 4, "by": {"30": 1}}, uid(77): {"hits": 4}})
    assert store.count(NAME) == 3
    (point,) = store.get(NAME, [uid(1), uid(77)], with_vectors=True)
    assert point.payload["hits"] == 4
    assert point.payload["by"] == {"30": 1}
    assert point.payload["seq"] == 1
    assert point.vector is not None
    assert np.allclose(point.vector, vectors(3)[1], atol=1e-6)


def test_order_and_deletion(store: VectorBackend) -> None:
    store.upsert(NAME, points(20))
    assert [p.payload["seq"] for p in store.extremes(NAME, "seq", limit=3)] == [0, 1, 2]
    assert [p.payload["seq"] for p in store.extremes(NAME, "seq", limit=2, largest=True)] == [19, 18]
    store.delete(NAME, [uid(0), uid(19), uid(500)])
    store.delete(NAME, [])
    assert [p.payload["seq"] for p in store.extremes(NAME, "seq", limit=1)] == [1]
    assert store.count(NAME) == 18
    store.tidy(NAME)
    assert store.count(NAME) == 18


def test_a_scroll_brings_every_point_once(store: VectorBackend, kind: str) -> None:
    n = 60 if kind == "local" else 1_100
    store.upsert(NAME, points(n))
    seen = list(store.scroll(NAME, only=("seq",)))
    assert sorted(int(p.payload["seq"]) for p in seen) == list(range(n))
    assert all(set(p.payload) == {"seq"} and p.vector is None for p in seen)
    assert sum(p.vector is not None for p in store.scroll(NAME, with_vectors=True)) == n


def test_collections_are_made_once_and_kept_apart(store: VectorBackend) -> None:
    store.create(NAME, DIM)
    store.create(NAME + "2", 4)
    assert store.dim(NAME + "2") == 4
    assert {NAME, NAME + "2"} <= set(store.collections())
    with pytest.raises(ConflictError, match="dimension"):
        store.create(NAME, DIM + 1)
    store.upsert(NAME, points(2))
    assert store.count(NAME + "2") == 0
    store.drop(NAME)
    store.drop(NAME)
    assert NAME not in store.collections()
    store.create(NAME, DIM)
    assert store.count(NAME) == 0


def test_errors_are_ours(store: VectorBackend) -> None:
    missing = NAME + "none"
    calls = (
        lambda: store.search(missing, vectors(1)[0]),
        lambda: store.count(missing),
        lambda: store.get(missing, [uid(1)]),
        lambda: list(store.scroll(missing)),
        lambda: store.dim(missing),
        lambda: store.upsert(missing, points(1)),
        lambda: store.extremes(missing, "seq", limit=1),
    )
    for call in calls:
        with pytest.raises(NotFoundError):
            call()
    with pytest.raises(InvalidInputError, match="dimension"):
        store.search(NAME, np.ones(3, dtype=np.float32))
    with pytest.raises(InvalidInputError):
        store.upsert(NAME, [Point(id=uid(1), payload={}, vector=np.ones(3, dtype=np.float32))])


def test_threads_may_write_and_search_at_once(store: VectorBackend, kind: str) -> None:
    n = 8 if kind == "local" else 60
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            for point in points(n, start=number * n):
                store.upsert(NAME, [point])
                store.search(NAME, vectors(1)[0], limit=3)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert store.count(NAME) == 4 * n


@pytest.mark.parametrize("persistent", ["edge", "edge-binary", "local"])
def test_points_survive_a_restart(persistent: str, tmp_path: Path) -> None:
    first = open_store(persistent, tmp_path)
    first.create(NAME, DIM)
    first.upsert(NAME, points(25))
    assert (first.disk_bytes() or 0) > 0
    first.close()
    second = open_store(persistent, tmp_path)
    assert second.collections() == [NAME]
    assert second.dim(NAME) == DIM
    assert second.search(NAME, vectors(25)[7])[0].id == uid(7)
    assert [p.payload["seq"] for p in second.extremes(NAME, "seq", limit=1, largest=True)] == [24]
    second.close()


def test_searches_made_together_find_what_single_ones_do(store: VectorBackend) -> None:
    store.upsert(NAME, points(40))
    queries = vectors(19, seed=7)
    where = Filter(equals={"client": "c1"})
    together = store.search_each(NAME, queries, limit=3, where=where)
    singly = [store.search(NAME, query, limit=3, where=where) for query in queries]
    assert [[(p.id, p.payload) for p in found] for found in together] == [
        [(p.id, p.payload) for p in found] for found in singly
    ]
    for found, expected in zip(together, singly, strict=True):
        assert [p.score for p in found] == pytest.approx([p.score for p in expected], abs=1e-6)
    assert store.search_each(NAME, []) == []
    odd = [*queries[:1], np.ones(3, dtype=np.float32)]
    with pytest.raises(InvalidInputError, match="dimensions"):
        store.search_each(NAME, odd)


@pytest.mark.parametrize("kind", ["edge", "local"])
def test_the_dimension_of_a_store_that_was_just_opened_is_known(kind: str, tmp_path: Path) -> None:
    before = open_store(kind, tmp_path)
    before.create(NAME, DIM)
    before.close()
    after = open_store(kind, tmp_path)
    with pytest.raises(InvalidInputError, match="dimensions"):
        after.search(NAME, np.ones(3, dtype=np.float32))
    after.close()


@pytest.mark.parametrize("embedded", ["edge", "local"])
def test_a_second_opener_is_told_who_holds_the_store(embedded: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from modm_tasks.settings import Settings;"
        "from vector_store.backends import open_backend;"
        f"b = open_backend(Settings(home=Path({str(tmp_path)!r}), qdrant_url=sys.argv[1]));"
        "print('open', flush=True); sys.stdin.readline()"
    )
    url = "edge:" if embedded == "edge" else f"local:{tmp_path / 'local'}"
    command = [sys.executable, "-c", code, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreInUseError, match=f"process {holder.pid}"):
            open_store(embedded, tmp_path)
        holder.kill()
        holder.wait(timeout=10)
    open_store(embedded, tmp_path).close()


def test_a_killed_writer_loses_no_acknowledged_point(tmp_path: Path) -> None:
    code = (
        "import sys, uuid; from pathlib import Path; import numpy as np; from modm_tasks.settings import Settings;"
        "from vector_store.backends import Point, open_backend;"
        f"b = open_backend(Settings(home=Path({str(tmp_path)!r})));"
        f"b.create({NAME!r}, 16); v = np.ones(16, dtype=np.float32)\n"
        "for i in range(10**6):\n"
        f"    b.upsert({NAME!r}, [Point(id=str(uuid.UUID(int=i + 1)), payload={{'seq': i}}, vector=v)])\n"
        "    print(i, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = -1
        while acknowledged < 200:
            acknowledged = int(writer.stdout.readline())
        writer.kill()
        acknowledged = max([acknowledged, *(int(line) for line in writer.stdout if line.strip().isdigit())])
    backend = open_store("edge", tmp_path)
    assert backend.count(NAME) >= acknowledged + 1
    assert {uid(i) for i in range(acknowledged + 1)} <= {p.id for p in backend.scroll(NAME, only=("seq",))}
    backend.close()


def test_a_creation_cut_short_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "vectors" / NAME / "segments" / "x").mkdir(parents=True)
    backend = open_store("edge", tmp_path)
    assert backend.collections() == []
    backend.create(NAME, DIM)
    assert backend.count(NAME) == 0
    backend.close()


def test_a_server_that_is_away_is_one_clear_line(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, qdrant_url="http://127.0.0.1:9", qdrant_api_key=None)
    with pytest.raises(UnavailableError, match=r"no Qdrant server at http://127\.0\.0\.1:9") as caught:
        open_backend(settings)
    assert "\n" not in str(caught.value)


def test_another_form_of_url_is_a_config_error(tmp_path: Path) -> None:
    for url in ("", "local:", "redis://x", "edge:x"):
        with pytest.raises(ConfigError, match="qdrant_url"):
            open_backend(Settings(home=tmp_path, qdrant_url=url, qdrant_api_key=SecretStr("k")))


def test_the_lock_file_says_what_it_is(tmp_path: Path) -> None:
    backend = open_store("edge", tmp_path)
    noted = json.loads((tmp_path / "vectors" / "holder.json").read_text())
    backend.close()
    assert noted["pid"] == os.getpid()
    assert noted["what"]
