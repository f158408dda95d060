"""`modm simulate` and `modm bench`, as a user calls them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from modm_tasks.errors import InvalidInputError, NotFoundError
from orchestrator.cli_bench_compare import bench_app
from orchestrator.cli_simulate import simulate_command
from orchestrator.device_profiles import FOLDER, load_profile
from orchestrator.simulator.experiments import SYSTEMS, Cell, missed_bars

ROOT = Path(__file__).parents[2]
app = typer.Typer()
app.command("simulate")(simulate_command)
app.add_typer(bench_app, name="bench")
LADDER = ".95:30,.90:25,.85:15,.80:10,.75:5"


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(40, 16))
    rows = centres[rng.integers(0, 40, 300)] + 0.2 * rng.normal(size=(300, 16))
    path = tmp_path_factory.mktemp("vectors") / "rows.npy"
    np.save(path, rows.astype(np.float16))
    return path


def call(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_one_liner(embeddings: Path) -> None:
    code, out, _ = call(
        *("simulate", "--embeddings", embeddings, "--ladder", LADDER, "--warm-cache", 100, "--gpus", 4),
        *("--large-s", 60, "--small-s", 11, "--arrivals", "poisson", "--rate-per-min", 10, "--seed", 42),
        *("--policy", "modm", "--workers", "pooled", "--json"),
    )
    assert code == 0
    report = json.loads(out)
    assert report["requests"]["done"] == 200
    assert {"policy", "hit_rate", "skipped_steps", "served_per_min", "latency_s", "queue_wait_s", "slo", "refined_by",
            "role_moves", "machine", "settings"} <= set(report)  # fmt: skip
    assert set(report["latency_s"]) == {"mean", "p50", "p95", "p99"}


def test_the_bundled_trace_by_its_real_vectors_hits_as_often_as_on_the_stack() -> None:
    code, out, _ = call(
        *("simulate", "--embeddings", ROOT / "ops/scenes/data/trace-vectors.npz", "--warm-cache", 200, "--gpus", 2),
        *("--ladder-file", ROOT / "vector_store/weights/scenes-clip/ladder.json", "--num-requests", 160),
        *("--large-s", 1.2, "--small-s", 0.257, "--rate-per-min", 100, "--policy", "modm", "--json"),
    )
    assert code == 0
    measured = json.loads((ROOT / "docs/reports/slo/slo-100/report.json").read_text())  # the same 160 requests
    assert json.loads(out)["hit_rate"] == pytest.approx(measured["hit_rate"], abs=0.02)


def test_profiles_features_recorded_arrivals_and_a_report_folder(embeddings: Path, tmp_path: Path) -> None:
    times = tmp_path / "times.jsonl"
    times.write_text("".join(json.dumps({"arrival_s": 3.0 * i + 100}) + "\n" for i in range(50)))
    code, out, _ = call(
        *("simulate", "--profile", "mi210", "--large", "sd3.5-large", "--small", "sana", "--embeddings", embeddings),
        *("--ladder", LADDER, "--warm-cache", 100, "--arrivals", "recorded", "--arrivals-file", times),
        *("--with", "inflight,late-binding", "--workers", "roles", "--period-s", 30, "--report", tmp_path / "out"),
    )
    assert code == 0
    assert "done=50" in out
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["machine"]["small_s"] == 6.5
    assert written["features"] == ["inflight", "late-binding"]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"per_minute.csv", "per_request.csv", "controller.csv", "latency_cdf.png", "roles.png", "queue.png"} <= names


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--embeddings", "none.npy", "--large-s", 1, "--small-s", 1), "none.npy"),
        (("--large-s", 1, "--small-s", 1, "--rate-per-min", 1), "--embeddings or --hit-rate"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--rate-per-min", 1), "--profile"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--profile", "flux", "--large", "flux.1-dev"), "unmeasured"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--profile", "h999"), "mi210"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--profile", "a40"), "rate"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--profile", "a40", "--policy", "best"), "modm-plus"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--profile", "a40", "--with", "magic"), "late-binding"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--profile", "a40", "--ladder", "x"), ".95:30"),
        (("--hit-rate", 0.5, "--num-requests", 5, "--profile", "a40", "--workers", "x"), "pooled-roles"),
    ],
)
def test_bad_input_is_one_line_and_no_traceback(args: tuple[object, ...], message: str) -> None:
    code, out, err = call("simulate", *args)
    assert code in {1, 2}
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_bench_simulated(embeddings: Path, tmp_path: Path) -> None:
    common = ("--simulate", "--embeddings", embeddings, "--ladder", LADDER, "--warm-up", 100, "--num-requests", 80)
    code, out, _ = call("bench", "slo", *common, "--rate-per-min", "4,8", "--report", tmp_path / "slo", "--json")
    assert code == 0
    assert list(json.loads(out)) == ["slo-4", "slo-8"]
    assert (tmp_path / "slo" / "p99.png").is_file()
    assert (tmp_path / "slo" / "slo-8" / "per_minute.csv").is_file()
    code, _, err = call("bench", "rising", *common, "--report", tmp_path / "rising")
    assert code == 0, err
    code, _, err = call("bench", "throughput", "--report", tmp_path / "none")
    assert (code, "--trace" in err) == (2, True)
    code, _, err = call("bench", "slo", *common, "--rate-per-min", "0")
    assert code == 2


def test_sweep_and_ablation_print_tables(embeddings: Path, tmp_path: Path) -> None:
    common = ("--embeddings", embeddings, "--ladder", LADDER, "--warm-cache", 200)
    code, out, _ = call("bench", "sweep", *common, "--rate-per-min", "6", "--seeds", 1, "--report", tmp_path)
    assert code == 0
    assert out.count("| 6 |") == len(SYSTEMS)
    assert (tmp_path / "sweep.csv").is_file()
    code, out, _ = call("bench", "ablation", *common)
    assert code == 0
    assert "modm + inflight" in out


def test_the_bars_of_the_policies_by_hand() -> None:
    def cell(system: str, violations_2x: float, rate: float) -> Cell:
        zero = dict.fromkeys((f.name for f in fields(Cell)), 0.0)
        return Cell(**zero | {"system": system, "rate_per_min": rate, "violations_2x": violations_2x})  # type: ignore[arg-type]

    def cells(quality: float, throughput: float, ours: float, rate: float = 4.0) -> list[Cell]:
        found = {"modm-quality": quality, "modm-throughput": throughput, "slo": ours}
        return [cell(name, value, rate) for name, value in found.items()]

    assert missed_bars(cells(0.08, 0.10, 0.08)) == []  # up to 10 % none is to be halved
    assert missed_bars(cells(0.20, 0.12, 0.06)) == []
    assert missed_bars(cells(0.20, 0.12, 0.07)) == ["4/min: slo 7.0%, modm-throughput 12.0%"]
    assert len(missed_bars(cells(0.0, 0.0, 0.001) + cells(0.5, 0.5, 0.3, rate=6.0))) == 4


def test_every_profile_figure_has_a_source(tmp_path: Path) -> None:
    for path in FOLDER.glob("*.toml"):
        for model, row in load_profile(path.stem).models.items():
            assert row.source, f"{path.name}: {model}"
    assert load_profile("mi210").image_s("sdxl") == 16.5
    assert load_profile("a40").models["sdxl"].inferred
    with pytest.raises(InvalidInputError, match="sdxl"):
        load_profile("mi210").image_s("dall-e")
    with pytest.raises(NotFoundError):
        load_profile(str(tmp_path / "no.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[models.x]\nimage_s = -1\n")
    with pytest.raises(InvalidInputError, match="image_s"):
        load_profile(str(broken))
