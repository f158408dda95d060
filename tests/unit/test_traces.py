"""Loaders on samples made from the published schemas, and on the real files where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modm_tasks.errors import InvalidInputError, ModmError, TraceError
from orchestrator.traces.arrivals import arrival_times, jitter
from orchestrator.traces.inspect import Summary, best_earlier, rate_plot, similarity_figures, write_jsonl
from orchestrator.traces.load import FORMATS, detect_format, load_trace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real workloads in ../shared/data")
PNG = b"\x89PNG\r\n\x1a\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]], *, group: int = 2) -> Path:
    schema = pa.schema(
        [("prompt", pa.string()), ("seed", pa.uint32()), ("step", pa.uint16()), ("width", pa.uint16()),
         ("height", pa.uint16()), ("user_name", pa.string()), ("timestamp", pa.timestamp("us", tz="UTC"))]
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def test_jsonl_and_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "arrival_s": 0, "seed": 5, "size": "64x64", "client": "u"},
        {"prompt": "b", "arrival_s": 1.5},
    ]
    loaded = load_trace(write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"))
    assert loaded.format == "jsonl"
    assert [(r.prompt, r.arrival_s, r.seed, r.client) for r in loaded.rows] == [("a", 0, 5, "u"), ("b", 1.5, None, "")]
    text = load_trace(write(tmp_path / "p.txt", "one\n\ntwo\nthree\n"), start=1, num_requests=1)
    assert [(r.prompt, r.row) for r in text.rows] == [("two", 3)]


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ('{"prompt": "a"', None, "is not JSON"),
        ('["a"]', None, "JSON object"),
        ('{"arrival_s": 1}', "prompt", "missing"),
        ('{"prompt": 3}', "prompt", "must be str"),
        ('{"prompt": "a", "arrival_s": "soon"}', "arrival_s", "must be"),
        ('{"prompt": "a", "arrival_s": -1}', "arrival_s", "from 0 on"),
        ('{"prompt": "a", "seed": true}', "seed", "must be int"),
        ('{"prompt": "a", "size": "1x1"}', "size", "pixels"),
        ('{"prompt": "a", "promt": "b"}', "promt", "unknown"),
        ('{"prompt": " "}', "prompt", "empty"),
    ],
)
def test_a_malformed_row_names_file_row_field_and_reason(
    tmp_path: Path, line: str, field: str | None, reason: str
) -> None:
    file = write(tmp_path / "bad.jsonl", '{"prompt": "ok"}\n' + line + "\n")
    with pytest.raises(TraceError, match=reason) as caught:
        load_trace(file)
    assert (caught.value.file, caught.value.row, caught.value.field) == ("bad.jsonl", 2, field)
    loaded = load_trace(file, skip_bad_rows=True)
    assert (len(loaded.rows), [(b.row, b.field) for b in loaded.skipped]) == (1, [(2, field)])


def test_a_trace_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"ok\n\xff\xfe\n")
    with pytest.raises(TraceError, match="UTF-8"):
        load_trace(tmp_path / "x.txt")
    (tmp_path / "x.parquet").write_bytes(PNG)
    with pytest.raises(TraceError, match="not Parquet"):
        load_trace(tmp_path / "x.parquet")
    with pytest.raises(TraceError, match="no such file"):
        load_trace(tmp_path / "none.txt")
    with pytest.raises(TraceError, match="no rows"):
        load_trace(write(tmp_path / "empty.txt", ""))
    with pytest.raises(InvalidInputError, match="unknown trace format"):
        load_trace(write(tmp_path / "y.txt", "a"), format="tape")


def test_diffusiondb_is_sorted_by_time_with_file_order_among_equals(tmp_path: Path) -> None:
    minute = 60_000_000
    rows = [
        {"prompt": p, "seed": i, "user_name": "u", "timestamp": t}
        for i, (p, t) in enumerate([("d", 3), ("a", 1), ("b", 1), ("none", None), ("c", 2), ("b2", 1)])
    ]
    for row in rows:
        row["timestamp"] = None if row["timestamp"] is None else row["timestamp"] * minute  # type: ignore[operator]
    file = parquet(tmp_path / "metadata.parquet", rows)
    loaded = load_trace(file)
    assert [r.prompt for r in loaded.rows] == ["a", "b", "b2", "c", "d", "none"]
    assert [r.arrival_s for r in loaded.rows] == [0, 0, 0, 60, 120, None]
    assert [r.prompt for r in load_trace(file, start=2, num_requests=2).rows] == ["b2", "c"]


def test_the_reference_slice_starts_at_row_50000(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "timestamp": i * 1_000_000} for i in range(50_010)]
    file = parquet(tmp_path / "metadata.parquet", rows, group=5000)
    assert [r.prompt for r in load_trace(file, slice_name="reference", num_requests=2).rows] == ["p50000", "p50001"]
    warm = load_trace(file, slice_name="reference-warm").rows
    assert (warm[0].prompt, warm[-1].prompt, len(warm)) == ("p40000", "p49999", 10_000)


def test_mjhq(tmp_path: Path) -> None:
    data = {"id1": {"category": "animals", "prompt": "a fox"}, "id2": {"category": "art"}}
    file = write(tmp_path / "meta_data.json", json.dumps(data))
    with pytest.raises(TraceError, match="id2"):
        load_trace(file)
    assert [r.prompt for r in load_trace(file, skip_bad_rows=True).rows] == ["a fox"]


GENTD = (
    "gmt_create,predict_type,exec_time_seconds,groupId,num_images_per_prompt,num_inference_steps\n"
    "2024-11-15 16:57:50,TXT_2_IMG,20,G1,2,30\n2024-11-15 16:58:50,TXT_2_IMG,20,G2,,\n"
)


def test_gentd26_joins_prompts_and_counts_what_it_filled_in(tmp_path: Path) -> None:
    file, prompts = write(tmp_path / "t.csv", GENTD), write(tmp_path / "p.txt", "one\ntwo\n")
    loaded = load_trace(file, prompts=prompts)
    assert [(r.prompt, r.arrival_s, r.num_inference_steps) for r in loaded.rows] == [
        ("one", 0, 30), ("one", 0, 30), ("two", 60, 30),
    ]  # fmt: skip
    assert loaded.defaulted == {"num_images_per_prompt": 1, "num_inference_steps": 1}
    with pytest.raises(InvalidInputError, match="--prompts"):
        load_trace(file)
    with pytest.raises(TraceError, match="YYYY"):
        load_trace(write(tmp_path / "u.csv", GENTD.replace("2024-11-15 16:58:50", "yesterday")), prompts=prompts)


def test_katz_diffserve_and_vllm_omni(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.txt", "one\ntwo\nthree\n")
    rows = [{"timestamp": 100.0, "scene_id": "A"}, {"timestamp": 101.5, "scene_id": "B"}]
    katz = load_trace(write(tmp_path / "k.json", json.dumps(rows)), prompts=prompts)
    assert [(r.prompt, r.arrival_s, r.client) for r in katz.rows] == [("one", 0, "A"), ("two", 1.5, "B")]
    served = load_trace(write(tmp_path / "d.trace", "368.0,2\n400.5,0\n"), prompts=prompts)
    assert served.format == "diffserve"
    assert [(r.prompt, r.arrival_s) for r in served.rows] == [("three", 0.368), ("one", 0.4005)]
    with pytest.raises(TraceError, match="0 to 2"):
        load_trace(write(tmp_path / "e.trace", "1.0,9\n"), prompts=prompts)
    line = "Request(request_id='r', prompt='a cat', width=64, height=128, num_inference_steps=20)\n"
    omni = load_trace(write(tmp_path / "o.txt", line))
    assert (omni.format, omni.rows[0].size, omni.rows[0].num_inference_steps) == ("vllm-omni", "64x128", 20)
    with pytest.raises(TraceError, match="plain values"):
        load_trace(write(tmp_path / "evil.txt", "Request(prompt=__import__('os').getcwd())\n"))


@given(data=st.binary(max_size=300), name=st.sampled_from([".jsonl", ".txt", ".csv", ".json", ".parquet"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_bytes_end_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / f"t{name}"
    file.write_bytes(data)
    prompts = write(folder / "p", "one\ntwo\n")
    for format_name in (None, *FORMATS):
        try:
            loaded = load_trace(file, format=format_name, prompts=prompts, skip_bad_rows=True)
        except ModmError as error:
            one_line = "\n" not in str(error)
        else:
            one_line = bool(loaded.rows)
        assert one_line


def test_conversion_keeps_the_rows(tmp_path: Path) -> None:
    loaded = load_trace(write(tmp_path / "p.txt", "one\ntwo\n"))
    write_jsonl(loaded.rows, tmp_path / "out.jsonl")
    assert [r.prompt for r in load_trace(tmp_path / "out.jsonl").rows] == ["one", "two"]


def test_arrivals() -> None:
    assert arrival_times("burst", 3) == [0.0, 0.0, 0.0]
    gaps = np.random.default_rng(42).exponential(6.0, 500)
    assert arrival_times("poisson", 500, rate_per_min=10, seed=42) == pytest.approx(np.cumsum(gaps).tolist())
    assert arrival_times("recorded", 3, recorded=[10.0, 12.0, 16.0], speed=2.0) == [0.0, 1.0, 3.0]
    rising = np.diff(arrival_times("rising", 200, rate_per_min=30, min_rate_per_min=1))
    assert np.all(np.diff(rising) < 0)
    assert 60 / rising[0] == pytest.approx(1 + 29 / (1 + np.exp(3)), rel=0.05)
    assert 60 / rising[-1] == pytest.approx(30, rel=0.01)
    waves = arrival_times("fluctuating", 3000, rate_per_min=25, seed=1)
    per_min = np.bincount((np.asarray(waves) // 60).astype(int))
    assert waves == sorted(waves)
    assert per_min.max() > 3 * max(1, np.percentile(per_min, 5))
    assert arrival_times("fluctuating", 50, rate_per_min=25, seed=1) == waves[:50]
    spread = jitter([0.0] * 100)
    assert len(set(spread)) > 10
    assert max(spread) <= 60
    bad = (("poisson", {}), ("recorded", {"recorded": [None]}), ("sometimes", {}), ("poisson", {"rate_per_min": 0}))
    for kind, more in bad:
        with pytest.raises(InvalidInputError):
            arrival_times(kind, 1, **more)  # type: ignore[arg-type]


def test_best_earlier_agrees_with_the_whole_product() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1100, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    best, where = best_earlier(vectors)
    full = np.tril(vectors @ vectors.T, -1) + np.triu(np.full((1100, 1100), -9.0))
    assert best[1:] == pytest.approx(full.max(axis=1)[1:], abs=1e-5)
    assert (where[1:] == full.argmax(axis=1)[1:]).mean() > 0.99


@real
def test_the_real_workloads() -> None:
    """The figures of ../shared/data/README.md, on the 3,000 prompts that are there (it gives those of 5,000)."""
    figures = Summary(load_trace(SHARED / "diffusiondb_prompts.txt")).figures()
    figures |= similarity_figures(np.load(SHARED / "diffusiondb_minilm.npy").astype(np.float32))
    assert figures["requests"] == 3000
    assert figures["exact repeats"] == pytest.approx(0.13, abs=0.02)
    assert figures["best earlier cosine >= 0.95"] == pytest.approx(0.32, abs=0.03)
    assert figures["best earlier cosine >= 0.80"] == pytest.approx(0.56, abs=0.04)
    assert figures["requests back, p10 / p50 / p90"].startswith("2 / ")
    gentd = load_trace(SHARED / "alibaba_gentd26_requests.csv", prompts=SHARED / "diffusiondb_prompts.txt")
    assert len(gentd.rows) > 16_000
    assert detect_format(SHARED / "alibaba_gentd26_requests.csv") == "gentd26"
    assert rate_plot(Summary(gentd).times).startswith(PNG)
