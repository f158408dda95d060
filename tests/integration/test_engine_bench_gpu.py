"""The GPU benchmark itself, at toy size on whatever is here; its full-size configurations on the meta device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ops.benchmarks.gpu import main
from workers.architectures import build


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    kept = torch.get_num_threads()
    yield
    torch.set_num_threads(kept)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 0
    assert "skipped" in capsys.readouterr().out


def test_every_part_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--tiny", "--families", "sd3,sdxl", "--steps", "3", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    for family in ("sd3", "sdxl"):
        row = report["families"][family]
        assert row["s_per_step"] > 0
        assert row["s_per_50_step_image"] > 0
        assert row["batch_2"]["gain"] > 0
    assert set(report["swap"]["to_device_s"]) == {"sd3", "sdxl"}
    assert report["modm_sd3_sdxl"]["speedup"] > 0
    assert "| sdxl |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "part", "billions"),
    [
        ("sd3", "transformer", 8.06),
        ("flux", "transformer", 11.90),
        ("sdxl", "unet", 2.57),
        ("sana", "transformer", 1.60),
    ],
)
def test_full_size_is_the_published_size(family: str, part: str, billions: float) -> None:
    pipeline = build(family, "full", dtype=torch.bfloat16, device="meta")
    count = sum(weights.numel() for weights in getattr(pipeline, part).parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_full_size_runs_on_this_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--families", "sdxl", "--steps", "4", "--budget-s", "120", "--out", str(out)]) == 0
    row = json.loads(out.read_text())["families"]["sdxl"]
    assert row.get("s_per_step", 0) > 0, row
