"""The replay of traces through eviction policies."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from modm_tasks.errors import InvalidInputError, NotFoundError, TraceError
from vector_store.embedder import unit_rows
from vector_store.simulate import load_vectors, make_plan, parse_ladder, read_prompts, replay, run, write

LADDER = "0.95:30,0.75:5"
REAL = Path(__file__).parents[3] / "shared" / "data" / "diffusiondb_minilm.npy"


def one_hot(*words: int) -> np.ndarray:
    return np.eye(10, dtype=np.float32)[list(words)]


def plan(sizes: str = "2", policies: str = "fifo", insert: str = "all", window: int = 4):
    return make_plan(sizes=sizes, policies=policies, insert=insert, ladder=LADDER, window=window)


def test_fifo_by_hand() -> None:
    result = replay(one_hot(0, 1, 0, 2, 0, 3, 4, 0), "fifo", 2, plan())
    assert result.hits == [False, False, True, False, True, False, False, False]
    assert result.gaps == [2, 2]
    assert result.ks == [30, 30]
    assert result.hit_rate_over_time() == [0.25, 0.25]


def test_lru_and_utility_keep_the_popular_image_that_fifo_loses() -> None:
    trace = one_hot(0, 1, 0, 2, 0, 3, 0, 4, 0)
    rates = {r.policy: r.summary()["hit_rate"] for r in run(trace, plan(policies="fifo,lru,utility", insert="miss"))}
    assert rates["lru"] == rates["utility"] == pytest.approx(4 / 9)
    assert rates["fifo"] < rates["lru"]


def test_static_never_changes_again() -> None:
    result = replay(one_hot(0, 1, 2, 2, 0, 1), "static", 2, plan())
    assert result.hits == [False, False, False, False, True, True]


def test_the_ladder_takes_the_best_rung() -> None:
    near = unit_rows(np.array([[1, 0], [0.8, 0.6], [1, 0.01]], dtype=np.float32))
    assert replay(near, "fifo", 5, plan(sizes="5")).ks == [5, 30]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sizes", {"sizes": "a"}),
        ("sizes", {"sizes": "0"}),
        ("policies", {"policies": "fifo,arc"}),
        ("insert", {"insert": "some"}),
        ("ladder", {"ladder": "0.9"}),
        ("ladder", {"ladder": "2:10"}),
    ],
)
def test_bad_options_are_named(field: str, change: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make_plan(**({"sizes": "1", "policies": "fifo", "insert": "all", "ladder": LADDER} | change))
    assert caught.value.field == field


def test_rungs_are_sorted() -> None:
    assert parse_ladder("0.7:5,0.9:30") == ((0.9, 30), (0.7, 5))


def test_traces_name_file_and_row(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.txt", tmp_path / "b.jsonl"
    good.write_text("a cat\n\na dog\n")
    bad.write_text('{"prompt": "x"}\n{"prompt": 3}\n')
    assert read_prompts(good) == ["a cat", "a dog"]
    with pytest.raises(TraceError, match="row 2: field 'prompt': not text"):
        read_prompts(bad)
    with pytest.raises(NotFoundError):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(InvalidInputError, match="trace or --embeddings"):
        load_vectors(good, bad)
    with pytest.raises(InvalidInputError, match="npy"):
        load_vectors(None, good)
    assert load_vectors(good, None, "fake").shape == (2, 64)


def test_csv_files_and_a_plot_are_written(tmp_path: Path) -> None:
    results = list(run(one_hot(0, 1, 0, 2, 0, 3, 4, 0), plan(sizes="1,2", policies="fifo,lru")))
    paths = write(results, tmp_path)
    assert {p.name for p in paths} == {"summary.csv", "hit_rate.csv", "gaps.csv", "reuse.csv", "cache_policies.png"}
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(r["policy"], r["size"]) for r in rows] == [("fifo", "1"), ("fifo", "2"), ("lru", "1"), ("lru", "2")]
    assert (tmp_path / "cache_policies.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
def test_the_real_trace_shows_locality() -> None:
    vectors = load_vectors(None, REAL)[:1000]
    small, large = run(vectors, make_plan(sizes="50,500", policies="fifo", insert="all", ladder="0.80:10"))
    assert large.summary()["hit_rate"] >= small.summary()["hit_rate"] > 0.25
    assert small.summary()["gap_p50"] < 20
