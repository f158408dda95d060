"""Every family with tiny random weights: saved as a folder, loaded by the catalogue, drawn and refined by the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modm_tasks.errors import CancelledByUserError, EngineError, OutOfMemoryError
from modm_tasks.settings import Settings, WorkerSettings
from tests.support.packages import altered_files
from workers.architectures import FAMILIES, build
from workers.catalogue import ModelEntry
from workers.diffusers_engine import DiffusersEngine
from workers.engine import GenerateParams, RefineParams
from workers.hub import explain
from workers.pipelines import call_arguments, exact_strength, exact_timesteps, load_pair

STEPS = 4
SETTINGS_OF = {
    "sana-sprint": 'pipeline = "SanaSprintPipeline"\nmax_steps = 2\n',
    "qwen-image": 'guidance_kwarg = "true_cfg_scale"\n',
    "z-image": "max_sequence_length = 64\n",
    "sana": "max_sequence_length = 32\n",
    "sd3": "max_sequence_length = 16\n",
    "flux": "max_sequence_length = 16\n",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers on busy cores: more threads wait for one another."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue file beside one saved folder per family."""
    folder = tmp_path_factory.mktemp("families")
    text = ""
    for family in FAMILIES:
        build(family).save_pretrained(folder / family)
        text += (
            f'[tiny-{family}]\nfolder = "{family}"\nsize = "32x32"\nguidance_scale = 3.0\n{SETTINGS_OF.get(family, "")}'
        )
    path = folder / "models.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def engine(catalogue: Path) -> DiffusersEngine:
    settings = Settings(models_file=catalogue, num_inference_steps=STEPS, worker=WorkerSettings(device="cpu"))
    made = DiffusersEngine(settings)
    made.load([f"tiny-{family}" for family in FAMILIES])
    return made


def params(family: str, **changes: Any) -> dict[str, Any]:
    return {"model": f"tiny-{family}", "prompt": "a red fox", "seed": 7, "negative_prompt": "blurry"} | changes


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_routes_run_the_steps_they_say_and_repeat_byte_for_byte(engine: DiffusersEngine, family: str) -> None:
    own = 2 if family == "sana-sprint" else STEPS
    seen: list[tuple[int, int]] = []
    drawn = engine.generate(GenerateParams(**params(family, on_step=lambda done, total: seen.append((done, total)))))
    assert drawn.model == f"tiny-{family}"
    assert drawn.image.size == (32, 32)
    assert drawn.image.mode == "RGB"
    assert drawn.steps_run == own
    assert seen == [(i + 1, own) for i in range(own)]
    assert pixels(engine.generate(GenerateParams(**params(family))).image) == pixels(drawn.image)
    assert pixels(engine.generate(GenerateParams(**params(family, seed=8))).image) != pixels(drawn.image)

    source = Image.linear_gradient("L").convert("RGB")  # 256x256: resized to the target
    for k in (1, STEPS - 1):
        refine = RefineParams(**params(family), source=source, skipped_steps=k, total_steps=STEPS)
        first, again = engine.refine(refine), engine.refine(refine)
        assert first.steps_run == own - min(round(k * own / STEPS), own - 1)
        assert pixels(first.image) == pixels(again.image)
        assert first.image.size == (32, 32)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "sana-sprint"])
def test_refining_walks_the_rest_of_the_refiners_own_schedule(
    engine: DiffusersEngine, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, _ = engine._residency.ensure(f"tiny-{family}")
    assert pair.image.scheduler is not pair.text.scheduler

    def walked(pipeline: Any, run: Any) -> list[float]:
        seen: list[float] = []
        step = pipeline.scheduler.step

        def spy(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(float(timestep))
            return step(output, timestep, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.scheduler, "step", spy)
            run()
        return seen

    full = walked(pair.text, lambda: engine.generate(GenerateParams(**params(family))))
    source = Image.linear_gradient("L")
    refine = RefineParams(**params(family), source=source, skipped_steps=1, total_steps=STEPS)
    assert len(full) == STEPS
    assert walked(pair.image, lambda: engine.refine(refine)) == full[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_the_options_that_a_cpu_has(engine: DiffusersEngine, catalogue: Path, family: str) -> None:
    options = WorkerSettings(
        device="cpu", channels_last=True, vae_slicing=True, vae_tiling=True, attention_backend="native"
    )
    tuned = DiffusersEngine(Settings(models_file=catalogue, num_inference_steps=STEPS, worker=options))
    tuned.load([f"tiny-{family}"])
    given = GenerateParams(**params(family))
    pairs = list(zip(pixels(tuned.generate(given).image), pixels(engine.generate(given).image), strict=True))
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 1, "only the order of summation differs"
    source = Image.linear_gradient("L")
    refine = RefineParams(**params(family), source=source, skipped_steps=1, total_steps=STEPS)
    assert tuned.refine(refine).steps_run == engine.refine(refine).steps_run


def test_sizes_that_a_family_cannot_draw_are_drawn_larger_and_cropped(engine: DiffusersEngine) -> None:
    for family in ("flux", "sana", "sdxl"):
        assert engine.generate(GenerateParams(**params(family, size=(40, 24)))).image.size == (40, 24)


def test_cancelling_stops_at_the_step_and_the_engine_goes_on(engine: DiffusersEngine) -> None:
    def stop_at_two(done: int, total: int) -> None:
        if done == 2:
            raise CancelledByUserError

    before = pixels(engine.generate(GenerateParams(**params("sd3"))).image)
    with pytest.raises(CancelledByUserError):
        engine.generate(GenerateParams(**params("sd3", on_step=stop_at_two)))
    assert pixels(engine.generate(GenerateParams(**params("sd3"))).image) == before


@pytest.mark.parametrize("family", ["sd3", "sdxl", "sana"])
def test_exact_strength_hits_every_step_of_every_schedule(engine: DiffusersEngine, family: str) -> None:
    pair, _ = engine._residency.ensure(f"tiny-{family}")
    for steps in (4, 20, 28, 50):
        for k in range(steps):
            strength = exact_strength(pair.image, k, steps)
            if family == "sana":
                assert steps - int(steps * strength) == k
            else:
                pair.image.scheduler.set_timesteps(steps)
                assert pair.image.get_timesteps(steps, strength, "cpu")[1] == steps - k


def test_each_family_is_called_in_its_own_way(engine: DiffusersEngine) -> None:
    def call(family: str, negative: str = "") -> dict[str, Any]:
        pair, _ = engine._residency.ensure(f"tiny-{family}")
        return call_arguments(pair, pair.text, prompt="p", negative_prompt=negative, guidance_scale=None, seed=0)

    assert call("sd3", "n")["negative_prompt"] == "n"
    assert call("sd3")["guidance_scale"] == 3.0
    assert "negative_prompt" not in call("flux", "n"), "FLUX has distilled guidance: it would be ignored"
    assert call("qwen-image")["true_cfg_scale"] == 3.0
    assert call("qwen-image")["negative_prompt"] == " ", "without one, Qwen-Image does not guide at all"
    assert "max_sequence_length" not in call("sdxl")


def test_timesteps_stay_float32_in_bfloat16_models(tmp_path: Path) -> None:
    """FLUX's own pipeline rounds 731.4 to 732; the denoiser's time embedding must see the schedule's value."""
    for family in ("flux", "qwen-image", "sd3"):
        pipeline = build(family, dtype=torch.bfloat16)
        seen: list[torch.Tensor] = []
        time_proj = pipeline.transformer.time_text_embed.time_proj
        time_proj.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].clone()))
        extra = {"max_sequence_length": 16} if family != "qwen-image" else {}
        with exact_timesteps(pipeline):
            pipeline(
                "a fox", width=32, height=32, num_inference_steps=5, output_type="latent",
                generator=torch.Generator().manual_seed(0), **extra,
            )  # fmt: skip
        scale = 1e-3 if family == "qwen-image" else 1.0
        seen = seen[::2] if family == "flux" else seen  # FLUX embeds its guidance by the same module, second
        assert {t.dtype for t in seen} == {torch.float32}
        got = torch.stack([t.flatten()[0] for t in seen])
        assert torch.allclose(got, pipeline.scheduler.timesteps * scale, rtol=1e-6), family


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path: Path, catalogue: Path) -> None:
    from huggingface_hub import errors as hub

    entry = ModelEntry(name="m", repo="org/model", revision="v9")

    def hub_error(kind: Any) -> Exception:
        import httpx

        return kind(
            "401 Client Error", response=httpx.Response(401, request=httpx.Request("GET", "https://hub/org/model"))
        )

    assert "is gated" in explain(entry, hub_error(hub.GatedRepoError))
    assert "has no revision 'v9'" in explain(entry, hub_error(hub.RevisionNotFoundError))
    assert "no repository 'org/model'" in explain(entry, hub_error(hub.RepositoryNotFoundError))
    wrapped = OSError("cannot load")
    wrapped.__cause__ = hub_error(hub.GatedRepoError)
    assert "HF_TOKEN" in explain(entry, wrapped)
    assert "modm models pull m" in explain(entry, OSError("no network"))

    torn = tmp_path / "torn"
    build("sd3").save_pretrained(torn)
    (torn / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(EngineError, match="model 'torn': cannot load") as caught:
        load_pair(ModelEntry(name="torn", folder=torn), WorkerSettings(), torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_device_too_small_says_so(catalogue: Path) -> None:
    settings = Settings(models_file=catalogue, worker=WorkerSettings(device="cpu", memory_mib=1))
    tight = DiffusersEngine(settings)
    tight._residency.budget = 1000
    with pytest.raises(OutOfMemoryError, match=r"needs .* MiB and the device has"):
        tight.load(["tiny-sdxl"])


def test_nothing_in_diffusers_is_patched() -> None:
    """Run last: the installed files still match the package's own record."""
    assert altered_files("diffusers") == []
