"""The reference's slices, worked by hand, and that loaders take them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from modm_tasks.errors import InvalidInputError, TraceError
from orchestrator.cli_trace import trace_app
from orchestrator.traces import datasets
from orchestrator.traces.arrivals import arrival_times
from orchestrator.traces.load import load_trace, stream_trace
from orchestrator.traces.slices import by_category, by_time


def test_by_time() -> None:
    assert by_time(None, 5, 7, 3) == (5, 7)
    assert by_time("reference", 0, None, 0) == (50_000, None)
    assert by_time("reference", 0, 1_100, 100) == (49_900, 1_100)  # the warm-up comes before the slice
    assert by_time("reference-warm", 0, None, 0) == (40_000, 10_000)
    assert by_time("reference-warm", 0, 100, 0) == (49_900, 100)
    with pytest.raises(InvalidInputError, match="only 50000 rows"):
        by_time("reference", 0, None, 50_001)
    with pytest.raises(InvalidInputError, match="unknown slice"):
        by_time("half", 0, None, 0)


def test_by_category() -> None:
    categories = ["a"] * 5 + ["b"] * 5
    assert by_category(categories, "reference", 4, 0) == [3, 4, 8, 9]
    assert by_category(categories, "reference", 6, 2) == [2, 7, 3, 4, 8, 9]  # warm-up rows first, just before the run's
    assert by_category(categories, "reference", 3, 0) == [3, 4, 9]
    assert by_category(categories, "reference", None, 0) == list(range(10))
    assert by_category(["a"] * 600 + ["b"] * 600, "reference-warm", 4, 0) == [98, 99, 698, 699]


def test_mjhq_slice_is_category_after_category(tmp_path: Path) -> None:
    data = {f"{c}{i}": {"category": c, "prompt": f"{c} {i}"} for i in range(6) for c in ("art", "food")}
    file = tmp_path / "meta_data.json"
    file.write_text(json.dumps(data))
    rows = load_trace(file, slice_name="reference", num_requests=4).rows
    assert [r.prompt for r in rows] == ["art 4", "art 5", "food 4", "food 5"]
    assert [r.row for r in rows] == [9, 11, 10, 12]


def test_a_long_parquet_is_read_in_parts_and_the_same_rows_come_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = [(i * 37) % 50 for i in range(500)]
    table = pa.table(
        {"prompt": [f"p{i}" for i in range(500)], "timestamp": pa.array(stamps, pa.timestamp("s", tz="UTC"))}
    )
    file = tmp_path / "m.parquet"
    pq.write_table(table, file, row_group_size=64)
    expected = [f"p{i}" for _, i in sorted((stamp, i) for i, stamp in enumerate(stamps))]
    monkeypatch.setattr(datasets, "GATHER_ROWS", 33)
    monkeypatch.setattr(datasets, "BATCH_ROWS", 20)
    assert [r.prompt for r in load_trace(file).rows] == expected
    assert [r.prompt for r in load_trace(file, start=401, num_requests=70).rows] == expected[401:471]
    assert [r.arrival_s for r in load_trace(file, start=10, num_requests=1).rows] == [1.0]
    with pytest.raises(TraceError, match="no rows from row 501 on"):
        load_trace(file, start=500)


def test_a_stream_can_be_read_twice_and_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    stream = stream_trace(file, skip_bad_rows=True)
    assert [len(list(stream)), len(list(stream)), len(stream.skipped)] == [1, 1, 1]


def test_katz_is_ordered_by_time(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    stamps = ["2024-01-01 00:00:09", "2024-01-01 00:00:04"]
    (tmp_path / "k.json").write_text(json.dumps([{"timestamp": stamp} for stamp in stamps]))
    rows = load_trace(tmp_path / "k.json", prompts=tmp_path / "p.txt").rows
    assert [(r.prompt, r.arrival_s, r.row) for r in rows] == [("one", 0.0, 2), ("two", 5.0, 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.jsonl", '{"a":' * 100_000),
        ("deep.json", "[" * 100_000),
        ("long.csv", 'gmt_create,num_images_per_prompt,num_inference_steps\n"' + "x" * 200_000 + '",1,1\n'),
        ("head.csv", '"' + "x" * 200_000 + '"\n'),
        ("steps.csv", "gmt_create,num_images_per_prompt,num_inference_steps\n2024-11-15 16:57:50,many,30\n"),
        ("time.json", '[{"timestamp": ' + "9" * 400 + "}]"),
    ],
)
def test_hostile_files_are_malformed_not_a_crash(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(TraceError):
        load_trace(tmp_path / name, prompts=tmp_path / "p.txt")


def test_recorded_times_out_of_order_keep_their_places() -> None:
    assert arrival_times("recorded", 3, recorded=[7.0, 5.0, 9.0]) == [2.0, 0.0, 4.0]


def test_convert_writes_a_slice_and_leaves_nothing_behind_on_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    run = CliRunner()
    out = tmp_path / "out.jsonl"
    done = run.invoke(trace_app, ["convert", str(tmp_path / "p.txt"), str(out), "--start", "1", "--json"])
    assert json.loads(done.stdout)["rows"] == 2
    assert [r.prompt for r in load_trace(out).rows] == ["two", "three"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    failed = run.invoke(trace_app, ["convert", str(tmp_path / "bad.jsonl"), str(tmp_path / "no.jsonl")])
    assert failed.exit_code == 2
    assert "bad.jsonl, row 2: field 'prompt'" in failed.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"p.txt", "out.jsonl", "bad.jsonl"}
    assert run.invoke(trace_app, ["convert", str(out), str(tmp_path / "none" / "x.jsonl")]).exit_code == 2
