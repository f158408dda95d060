"""What the benchmarks of embedding, start-up and traces compute from what they measure."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ops.benchmarks import embed, startup, traces
from orchestrator.traces.load import load_trace

ROLLUP = """00400000-7ffd000 ---p 00000000 00:00 0    [rollup]
Rss:               20480 kB
Pss:               10240 kB
Pss_Dirty:          9000 kB
Shared_Clean:      12288 kB
Private_Clean:      1024 kB
Private_Dirty:      7168 kB
Swap:                  0 kB
"""


def test_gain_is_per_prompt_against_the_smallest_batch() -> None:
    one, two, eight = embed.rows({1: [0.5, 0.010, 0.010], 2: [0.012, 0.012, 0.9], 8: [0.020, 0.020, 0.020]})
    assert one == {"batch": 1, "call_ms": 10.0, "per_prompt_ms": 10.0, "gain": 1.0}
    assert two == {"batch": 2, "call_ms": 12.0, "per_prompt_ms": 6.0, "gain": 1.67}
    assert (eight["per_prompt_ms"], eight["gain"]) == (2.5, 4.0)


def test_every_batch_size_is_called_as_often_and_with_so_many_prompts() -> None:
    class Counting:
        identity, dim = "counting", 2

        def __init__(self) -> None:
            self.calls: list[int] = []

        def embed_texts(self, texts: list[str]) -> np.ndarray:
            self.calls.append(len(set(texts)))
            return np.ones((len(texts), 2), dtype=np.float32)

    embedder = Counting()
    seconds = embed.measure(embedder, [f"prompt {i}" for i in range(20)], [1, 4, 16], repeats=3)  # type: ignore[arg-type]
    assert {size: len(values) for size, values in seconds.items()} == {1: 3, 4: 3, 16: 3}
    assert embedder.calls == [1, 4, 16] * 4  # the first three warm up


def test_memory_of_a_process_and_medians() -> None:
    assert startup.memory_mib(ROLLUP) == {"rss_mib": 20, "pss_mib": 10, "private_mib": 8}
    rows = [{"redis": 1.0, "worker0": 5.0}, {"redis": 3.0, "worker0": 6.0}, {"redis": 2.0}]
    assert startup.median_of(rows) == {"redis": 2.0, "worker0": 5.5}


@pytest.mark.skipif(not Path("/proc").joinpath("self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_memory_and_age_of_this_very_process() -> None:
    own = startup.memory_mib(Path("/proc/self/smaps_rollup").read_text())
    assert own["rss_mib"] >= own["pss_mib"] >= own["private_mib"] > 10
    assert 0 < startup.age_s(os.getpid()) < 3600


@pytest.mark.parametrize("order", ["shuffled", "time"])
def test_the_written_trace_is_one_that_the_loader_reads_by_time(tmp_path: Path, order: str) -> None:
    file = tmp_path / "metadata-large.parquet"
    traces.write(file, 3000, order)
    rows = load_trace(file).rows
    times = [row.arrival_s or 0.0 for row in rows]
    assert len(rows) == 3000
    assert times == sorted(times)
    assert (sorted(row.row for row in rows) == [row.row for row in rows]) is (order == "time")
    lengths = [len(row.prompt) for row in rows]
    assert np.median(lengths) == pytest.approx(176, rel=0.1)
    assert len({row.prompt for row in rows}) == pytest.approx(3000 / traces.ROWS_PER_PROMPT, abs=2)


def test_rows_per_second_count_what_was_looked_at() -> None:
    ran = {"seconds": 2.0, "peak_mib": 99.6}
    assert traces.row("trace convert", 1000, 10, ran) == {
        "command": "trace convert", "file_rows": 1000, "rows_taken": 10, "seconds": 2.0, "rows_per_s": 500, "peak_mib": 100,
    }  # fmt: skip
