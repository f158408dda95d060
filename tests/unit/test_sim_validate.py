"""The simulator against a run's report, and the gate of `modm bench validate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from modm_tasks.errors import InvalidInputError, NotFoundError
from modm_tasks.messages import RequestRecord, new_request_id
from orchestrator.cli_bench_compare import bench_app
from orchestrator.device_profiles import DeviceProfile, as_toml, load_profile
from orchestrator.simulator.validate import compare, read_run, turnaround
from orchestrator.stack_profile import line, profile_of

LARGE_S, SMALL_S, FIXED_S, GAP_S, TURN_S = 1.0, 0.2, 0.05, 0.02, 0.01


def write_run(folder: Path, n: int = 90) -> Path:
    """A run that two workers and a closed loop of two users would give, with 3 % noise."""
    rng = np.random.default_rng(5)
    users, workers, rows = [0.0, 0.0], [0.0, 0.0], []
    for i in range(n):
        user, worker = int(np.argmin(users)), int(np.argmin(workers))
        arrival = users[user]
        k = 0 if i % 3 == 0 else (10, 30)[i % 2]
        seconds = LARGE_S if k == 0 else SMALL_S * (1 - k / 50)
        claimed = max(arrival, workers[worker]) + GAP_S
        done = claimed + (FIXED_S + seconds) * rng.uniform(0.97, 1.03)
        workers[worker], users[user] = done, done + TURN_S
        times = {"arrival_s": 1e9 + arrival, "claimed_s": 1e9 + claimed, "done_s": 1e9 + done}
        source = f"r{i - 5}" if k else ""
        rows.append({"id": f"r{i}", "state": "done", "skipped_steps": k, "source_id": source, "waits_on": ""} | times)
    folder.mkdir(parents=True)
    with (folder / "requests.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    latency = [r["done_s"] - r["arrival_s"] for r in rows]
    span = max(r["done_s"] for r in rows) - 1e9
    report = {
        "name": "modm", "policy": "modm", "hit_rate": 0.66, "served_per_min": 60 * n / span, "machine": {},
        "latency_s": {"p50": float(np.median(latency)), "p99": 0.0},
        "role_moves": 0,
        "settings": {
            "workers": 2, "mode": "pooled", "arrivals": "closed", "concurrency": 2,
            "models": {"large": "big", "small": "little"},
        },
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    return folder


PROFILE = f"""
device = "test"
overhead_s = {FIXED_S + GAP_S}
[models.big]
image_s = {LARGE_S}
source = "test"
[models.little]
image_s = {SMALL_S}
source = "test"
"""


def test_a_run_is_reproduced_and_the_gate_holds(tmp_path: Path) -> None:
    run, profile = write_run(tmp_path / "run"), tmp_path / "here.toml"
    profile.write_text(PROFILE)
    _, rows = read_run(run)
    assert turnaround(rows, 2) == pytest.approx(TURN_S, abs=0.005)
    assert turnaround(rows, 0) == 0.0
    call = ["validate", "--run", str(run), "--profile", str(profile), "--report", str(tmp_path / "v")]
    result = CliRunner().invoke(_app(), call)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "v" / "report.json").read_text())
    assert found["passed"]
    assert found["simulated"]["hit_rate"] == pytest.approx(0.66, abs=0.03)
    assert found["errors"]["served_per_min"] < 0.05
    assert (tmp_path / "v" / "latency_cdf.png").read_bytes().startswith(b"\x89PNG")
    slower = PROFILE.replace(f"image_s = {LARGE_S}", "image_s = 1.4")
    profile.write_text(slower)
    missed = CliRunner().invoke(_app(), call)
    assert missed.exit_code == 4
    assert "simulator is off" in missed.stderr


def test_with_the_runs_vectors_the_simulator_finds_sources_by_itself(tmp_path: Path) -> None:
    run, profile = write_run(tmp_path / "run"), tmp_path / "here.toml"
    profile.write_text(PROFILE)
    _, rows = read_run(run)
    # Every third prompt is like one image of the warm cache, the others like nothing: those rows are k = 30, whatever the
    # real router found. The file's order is not that of the arrivals.
    n = len(rows)
    text = np.eye(n + 2)[2:]
    text[::3] = 0.95 * np.eye(n + 2)[0] + np.sqrt(1 - 0.95**2) * text[::3]
    order = np.random.default_rng(1).permutation(n)
    np.savez(
        run / "vectors.npz", ids=np.array([rows[i].id for i in order]), text=text[order], warm=np.eye(n + 2)[:2],
        image=np.tile(np.eye(n + 2)[1], (n, 1)), ladder=np.array([(0.9, 30.0)]),
    )  # fmt: skip
    found, _ = compare(run, load_profile(str(profile)))
    assert found["simulated"]["hit_rate"] == pytest.approx(1 / 3, abs=0.01)
    np.savez(
        run / "vectors.npz", ids=np.array(["other"]), text=text[:1], warm=text[:1], image=text[:1], ladder=[(0.9, 30)]
    )
    with pytest.raises(InvalidInputError, match="vectors"):
        compare(run, load_profile(str(profile)))


def _app() -> typer.Typer:
    app = typer.Typer()
    app.add_typer(bench_app)
    return app


def test_folders_that_hold_no_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing"):
        read_run(tmp_path / "nothing")
    run = write_run(tmp_path / "run")
    (run / "report.json").write_text(json.dumps({"settings": {}, "policy": "modm"}))
    with pytest.raises(InvalidInputError, match="lacks settings"):
        compare(run, DeviceProfile(name="x", device="", models={}))
    (run / "requests.csv").write_text("id,state\nr,done\n")
    with pytest.raises(InvalidInputError):
        read_run(run)


def record(claimed_s: float, took_s: float, steps: int, *, worker: str = "w", waits_s: float = 0.0) -> RequestRecord:
    hit = steps < 50
    model, route, source = ("little", "small-refine", "s") if hit else ("big", "large-gen", None)
    return RequestRecord.model_validate(
        {
            "id": new_request_id(), "state": "done", "request": {"prompt": "p"}, "worker": worker,
            "decision": {"route": route, "policy": "modm", "source_id": source},
            "completion": {
                "uri": "u", "width": 64, "height": 64, "seed": 0, "model": model, "steps_run": steps, "skipped_steps": 0,
                "depth": 0, "gpu_s": took_s, "vector": "", "embedder": "e",
            },
            "arrival_s": claimed_s - waits_s - 0.02, "queued_s": claimed_s - waits_s, "claimed_s": claimed_s,
            "done_s": claimed_s + took_s + 0.03,
        }
    )  # fmt: skip


def test_the_stack_is_profiled_by_hand() -> None:
    # Large 2 s; hits 0.1 s and 0.01 s a step; 0.03 s beside drawing, and the next request is claimed 0.05 s later.
    large = [record(10 + 2.08 * i, 2.0, 50, waits_s=30.0) for i in range(6)]
    hits = [record(100 + i, 0.1 + 0.01 * n, n, worker=f"w{i}") for i, n in enumerate((20, 25, 40, 45, 40, 20))]
    alone = [record(200 + 5 * i, 0.8 * (0.1 + 0.01 * 40), 40, waits_s=0.004) for i in range(5)]
    found = profile_of(large, hits, large, alone)
    assert found["models"]["big"]["image_s"] == pytest.approx(2.0)
    assert found["models"]["little"]["image_s"] == pytest.approx(0.6)
    assert found["models"]["little"]["step_s"] == pytest.approx(0.01)
    assert (found["overhead_s"], found["gap_s"]) == (pytest.approx(0.03), pytest.approx(0.05))
    assert (found["front_s"], found["claim_s"]) == (pytest.approx(0.02), pytest.approx(0.004))
    assert found["alone_share"] == pytest.approx(0.8)
    assert found["models"]["big"]["spread"] == pytest.approx([1.0] * 20)
    # Five of 2.03 s and one of 4.06: of twenty equally likely values the last few lie between the two.
    uneven = profile_of([*large[:5], record(99, 4.03, 50, waits_s=30.0)], hits, large, alone)["models"]["big"]["spread"]
    assert uneven[:16] == pytest.approx([1.0] * 16)
    assert uneven[-1] == pytest.approx(1.0 + 0.875, abs=1e-3)  # at .975 of five gaps: 4.875
    with pytest.raises(InvalidInputError, match="too few"):
        profile_of(large[:2], hits, large, alone)
    # One number of steps says nothing of the part that is no step; a line that falls is noise.
    assert line([(40, 0.4), (40, 0.4)]) == (pytest.approx(0.01), 0.0)
    assert line([(20, 0.4), (40, 0.3)])[1] == 0.0


def test_a_measured_profile_is_read_back(tmp_path: Path) -> None:
    rows = {"image_s": 2.5, "step_s": 0.04, "draws": 7, "spread": [0.9, 1.0, 1.3]}
    text = as_toml(
        {"how": "test", "device": 'a "GPU"', "steps": 50, "overhead_s": 0.1, "front_s": 0.2, "models": {"a.b": rows}}
    )
    (tmp_path / "mine.toml").write_text(text)
    found = load_profile(str(tmp_path / "mine.toml"))
    assert (found.device, found.overhead_s, found.front_s, found.claim_s) == ('a "GPU"', 0.1, 0.2, 0.0)
    assert found.fixed_s("a.b") == pytest.approx(0.5)
    assert found.step_s() == {"a.b": pytest.approx(0.05)}
    assert found.models["a.b"].spread == (0.9, 1.0, 1.3)
    assert "7 images" in found.models["a.b"].source
