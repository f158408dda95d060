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
from orchestrator.cli_bench_compare import bench_app
from orchestrator.simulator.validate import calibrate, read_run, turnaround, validate

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
        "latency_s": {"p50": float(np.median(latency))},
        "settings": {"workers": 2, "mode": "pooled", "arrivals": "closed", "concurrency": 2},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_times_are_calibrated_from_the_first_part(tmp_path: Path) -> None:
    _, rows = read_run(write_run(tmp_path / "run"))
    large, small, overhead = calibrate(rows, 50, 2)
    assert large + overhead == pytest.approx(LARGE_S + FIXED_S + GAP_S, rel=0.03)
    assert small * 0.6 + overhead == pytest.approx(SMALL_S * 0.6 + FIXED_S + GAP_S, rel=0.05)
    assert turnaround(rows, 2) == pytest.approx(TURN_S, abs=0.005)
    assert turnaround(rows, 0) == 0.0


def test_a_run_is_reproduced_and_the_gate_holds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    found = validate(run)
    assert found["passed"], found
    assert found["simulated"]["hit_rate"] == pytest.approx(0.66, abs=0.03)
    result = CliRunner().invoke(_app(), ["validate", str(run), "--report", str(tmp_path / "v.json")])
    assert result.exit_code == 0
    assert json.loads((tmp_path / "v.json").read_text())[0]["run"] == "modm"
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"served_per_min": report["served_per_min"] * 1.3}))
    missed = CliRunner().invoke(_app(), ["validate", str(run)])
    assert missed.exit_code == 4
    assert "off for modm" in missed.stderr


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
        validate(run)
    (run / "requests.csv").write_text("id,state\nr,done\n")
    with pytest.raises(InvalidInputError):
        read_run(run)
