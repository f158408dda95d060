"""`modm profile`: medians over processes, the saved file, and the controller's first prices from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modm_tasks.errors import EngineError, InvalidInputError, NotFoundError
from modm_tasks.settings import Settings
from orchestrator.controller.prices import profiled
from orchestrator.device_profiles import load_profile
from tests.support.processes import run_modm
from workers.device import profiled_step_s
from workers.profile import combine, measure


def one(full: list[float], half: list[float], device: str = "d") -> dict[str, Any]:
    draws = {"full_s": full, "half_s": [(s, 25) for s in half]}
    return {"device": device, "steps": 50, "models": {"m": draws}, "store_s": [0.01, 0.03]}


def test_medians_over_all_processes_by_hand() -> None:
    found = combine([one([1.0, 1.1, 9.0], [0.55, 0.6, 0.6]), one([1.2, 1.1, 1.0], [0.6, 0.6, 0.7])])
    # Median 1.1 s of a whole image and .6 s of half of it: 25 steps take .5 s, so .1 s is no step.
    assert found["models"]["m"] == {"image_s": 1.1, "step_s": 0.02, "draws": 6}
    assert (found["workers"], found["overhead_s"]) == (2, 0.02)
    with pytest.raises(EngineError, match="different devices"):
        combine([one([1.0], [0.5]), one([1.0], [0.5], device="other")])
    with pytest.raises(InvalidInputError, match="at least 5"):
        measure(workers=1, images=4)


def test_profile_is_measured_saved_and_used(environ: dict[str, str], settings: Callable[..., Settings]) -> None:
    made = settings()
    assert profiled(made) == {}
    fake = {"MODM_EMBEDDER": "fake", "MODM_WORKER__FAKE_LARGE_S": "0.05", "MODM_WORKER__FAKE_SMALL_S": "0.02"}
    done = run_modm("profile", "--save", "--workers", "2", env=environ | fake)
    assert done.returncode == 0, done.stderr
    assert "scenes-large" in done.stdout
    found = load_profile(str(made.home / "profile.toml"))
    assert found.image_s("scenes-large") == pytest.approx(0.05, rel=0.5)
    assert found.image_s("scenes-small") == pytest.approx(0.02, rel=0.8)
    assert profiled(made) == found.step_s()
    # A worker tells it as its own prices, but not those of another device.
    assert profiled_step_s(made, found.device) == pytest.approx(found.step_s())
    assert profiled_step_s(made, "NVIDIA A40") == {}
    call = ("simulate", "--profile", "local", "--hit-rate", "0.5", "--num-requests", "20", "--rate-per-min", "60")
    simulated = run_modm(*call, "--large", "scenes-large", "--small", "scenes-small", env=environ)
    assert "done=20" in simulated.stdout, simulated.stderr


def test_a_worker_starts_without_a_profile_that_cannot_be_read(
    settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    made = settings()
    assert profiled_step_s(made, "d") == {}
    made.home.mkdir(parents=True)
    for text in ("no toml", 'device = "d"', 'device = "d"\ntotal_steps = 0\n[models.m]\nimage_s = 1.0'):
        caplog.clear()
        (made.home / "profile.toml").write_text(text)
        assert profiled_step_s(made, "d") == {}
        assert "left out" in caplog.text


def test_a_profile_that_is_not_there_is_named(settings: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        profiled(settings(controller={"profile": str(tmp_path / "nowhere.toml")}))
    assert profiled(settings(controller={"profile": "mi210"}))["sdxl"] == pytest.approx(16.5 / 50)
