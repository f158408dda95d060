"""Training survives interruption: an interrupted and resumed stage ends in the very state of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ops.scenes.denoisers import FrozenText, grow, load_bank, make_large, start_from_shipped
from ops.scenes.export import DIFFUSION_FOLDER, LARGE
from ops.scenes.loop import StageConfig, load_average, rate_at, step_random
from ops.scenes.text import train_text


def _text_stage(folder: Path, *stops: int | None) -> dict[str, dict[str, torch.Tensor]]:
    config = StageConfig(name="text", steps=4, learning_rate=1e-3, log_every=100)
    for stop in stops:
        train_text(folder, config, stop_after=stop)
    return load_average(folder, "text")


def test_an_interrupted_stage_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = _text_stage(tmp_path / "whole", None)
    resumed = _text_stage(tmp_path / "resumed", 1, 2, None)
    assert whole.keys() == resumed.keys()
    for module, state in whole.items():
        for name, value in state.items():
            assert torch.equal(value, resumed[module][name]), f"{module}.{name}"


def test_a_finished_stage_is_left_alone(tmp_path: Path) -> None:
    _text_stage(tmp_path, None)
    before = (tmp_path / "text.pt").read_bytes()
    _text_stage(tmp_path, None)
    assert (tmp_path / "text.pt").read_bytes() == before


def test_an_interruption_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    _text_stage(tmp_path, 2)
    (tmp_path / "text.tmp").write_bytes(b"half a checkpoint")
    whole = _text_stage(tmp_path / "whole", None)
    resumed = _text_stage(tmp_path, None)
    assert torch.equal(whole["clip_l"]["text_projection.weight"], resumed["clip_l"]["text_projection.weight"])


def test_randomness_depends_on_seed_stage_and_step_only() -> None:
    draws = [
        torch.rand(3, generator=step_random(seed, stage, step).torch)
        for seed, stage, step in ((0, "a", 1), (0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])


def test_the_rate_warms_up_stays_and_falls() -> None:
    config = StageConfig(name="x", steps=1000, learning_rate=1.0, warmup=100, decay=0.5)
    assert rate_at(0, config) == pytest.approx(0.01)
    assert rate_at(300, config) == 1.0
    assert rate_at(750, config) == pytest.approx(0.5)
    assert rate_at(999, config) < 0.001


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 9)])
def test_a_grown_model_computes_what_the_shallow_one_did(old: int, new: int) -> None:
    torch.manual_seed(0)
    shallow = make_large(old).eval()
    deep = make_large(new).eval()
    deep.load_state_dict(grow(shallow.state_dict(), old, new))
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([400.0]),
        "encoder_hidden_states": torch.randn(1, 25, 128),
        "pooled_projections": torch.randn(1, 128),
    }
    with torch.no_grad():
        assert torch.allclose(shallow(**inputs).sample, deep(**inputs).sample, atol=1e-5)


def test_a_denoiser_can_start_from_what_is_shipped(tmp_path: Path) -> None:
    start_from_shipped(DIFFUSION_FOLDER / LARGE, tmp_path)
    bank = load_bank(tmp_path, size=500)
    # The shipped VAE normalises its latents; a second normalisation would show as another spread.
    assert abs(float(bank.latents.astype("float32").std()) - 1) < 0.1
    again = load_bank(tmp_path, size=500)
    assert (again.latents == bank.latents).all()
    text = FrozenText(tmp_path)
    hidden, pooled = text.encode(["a big red circle on a plain blue background", "a small green star"])
    assert hidden.shape == (2, 25, 128)
    assert pooled.shape == (2, 128)
    assert float((pooled[0] - pooled[1]).norm()) > 1
