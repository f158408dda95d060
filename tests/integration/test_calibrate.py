"""`modm calibrate` from prompts to a ladder file that the router loads: with the test doubles, and with tiny pipelines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from modm_tasks.settings import RoutingSettings, Settings
from orchestrator.build import choose_ladder
from orchestrator.cli import app
from workers.testing import FakeEngine

WORDS = ("red", "blue", "green", "round", "square", "tall")


def shades(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """A metric: random pipelines draw no better or worse than one another."""
    return [1.0 for _ in images]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a {a} fox beside a {b} house\n" for a in WORDS for b in WORDS))
    return path


def modm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *args: str, **settings: str) -> Result:
    for name, value in {"MODM_HOME": str(tmp_path / "home"), **settings}.items():
        monkeypatch.setenv(name, value)
    return CliRunner().invoke(app, ["calibrate", *args])


FAKE = {
    "MODM_WORKER__ENGINE": "fake", "MODM_EMBEDDER": "fake", "MODM_WORKER__FAKE_LARGE_S": "0",
    "MODM_WORKER__FAKE_SMALL_S": "0",
}  # fmt: skip


def test_the_router_loads_what_it_writes_and_a_second_run_draws_nothing(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "ladder.json"
    args = [str(prompts), "-o", str(output), "--pairs", "3", "--least-pairs", "8", "--depths", "30,10"]
    done = modm(tmp_path, monkeypatch, *args, **FAKE)
    assert done.exit_code == 0, done.output
    written = json.loads(output.read_text())
    assert written["hold_out"]["prompts"] == 18
    assert [r["skipped_steps"] for r in written["rungs"]] == [30, 10]
    # Fake images show their prompts, so a refined one is as good as a large one at every similarity.
    assert all(r["of_large"] == pytest.approx(1.0, abs=1e-3) for r in written["hold_out"]["rungs"] if r["pairs"])
    assert written["prediction"]["slope"] == pytest.approx(1.0, abs=0.01)
    settings = Settings(embedder="fake", routing=RoutingSettings(ladder_file=output))
    assert choose_ladder(settings).refiner == "scenes-small"
    assert choose_ladder(settings).lookup(1.0).skipped_steps == 30  # type: ignore[union-attr]

    def drawn(*_: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(FakeEngine, "_run", drawn)
    again = modm(tmp_path, monkeypatch, *args, "--json", **FAKE)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == written


def test_tiny_random_pipelines(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.architectures import build

    build("sdxl").save_pretrained(tmp_path / "sdxl")
    catalogue = tmp_path / "models.toml"
    catalogue.write_text("".join(f'[tiny-{n}]\nfolder = "sdxl"\nsize = "32x32"\n' for n in ("large", "small")))
    output = tmp_path / "ladder.json"
    done = modm(
        tmp_path, monkeypatch, str(prompts), "-o", str(output), "--num-prompts", "10", "--pairs", "2", "--depths", "1,2",
        "--least-pairs", "3", "--large-model", "tiny-large", "--small-model", "tiny-small", "--metric", f"{__name__}:shades",
        MODM_MODELS_FILE=str(catalogue), MODM_EMBEDDER="fake", MODM_NUM_INFERENCE_STEPS="3", MODM_WORKER__DEVICE="cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads(output.read_text())
    assert (written["large"], written["refiner"], written["num_inference_steps"]) == ("tiny-large", "tiny-small", 3)
    assert written["hold_out"]["large_quality"] == 1.0
    assert len(list((tmp_path / "home" / "calibration").glob("*.png"))) > 10


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--alpha", "1.5"), "alpha must be"),
        (("--depths", "50"), r"within 1\.\.49"),
        (("--depths", "x"), "must look like"),
        (("--metric", "nowhere:to"), "neither clip nor"),
        (("--num-prompts", "3"), "at least 8"),
        (("--embedder", "psychic"), "psychic"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, str], line: str
) -> None:
    done = modm(tmp_path, monkeypatch, str(prompts), "-o", str(tmp_path / "l.json"), *args, **FAKE)
    assert done.exit_code == 2, done.output
    (said,) = [text for text in done.output.splitlines() if text.startswith("error:")]
    assert re.search(line, said)
    assert not (tmp_path / "l.json").exists()
