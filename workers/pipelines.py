"""Loading and calling diffusers pipelines: one set of weights, text-to-image and image-to-image.

Nothing in diffusers is patched. What differs between families is how they want to be called, and that is read from the
signature of the pipeline and from the catalogue entry.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from modm_tasks.errors import ConfigError, EngineError, ModmError, OutOfMemoryError
from modm_tasks.settings import WorkerSettings
from workers.catalogue import ModelEntry, missing_weights
from workers.engine import StepCallback
from workers.hub import explain, first_line
from workers.options import apply_options, denoiser, load_arguments

# Bars and advice of the libraries are for people at a prompt; a worker's log is read by machines.
diffusers.logging.disable_progress_bar()
diffusers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pipelines over one set of weights, each with a scheduler of its own."""

    entry: ModelEntry
    text: Any
    image: Any

    def modules(self) -> list[torch.nn.Module]:
        """Every network, once."""
        return [part for part in self.text.components.values() if isinstance(part, torch.nn.Module)]


def load_pair(entry: ModelEntry, options: WorkerSettings, device: torch.device) -> Pair:
    """Load from folder or hub into host memory. Raises ConfigError or EngineError with one line."""
    if problem := missing_weights(entry):
        raise ConfigError(problem, field="model")
    # On a CPU bfloat16 gained 14 % with scenes-large and lost 23 % with scenes-small (docs/models.md): not worth its noise.
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, entry.dtype)
    # Never a pickle: where a model has none but .bin files, loading says so.
    common: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    if importlib.util.find_spec("accelerate") is None:
        common["low_cpu_mem_usage"] = False  # what diffusers falls back to, with four lines of warning
    arguments: dict[str, Any] = common | load_arguments(options, dtype)
    if entry.folder is None:
        arguments |= {"revision": entry.revision, "variant": entry.variant}
    else:
        arguments |= dict.fromkeys(absent_parts(entry.folder))
    try:
        with quiet():
            if entry.vae:
                arguments["vae"] = diffusers.AutoencoderKL.from_pretrained(entry.vae, **common)
            loader = _class(entry, entry.pipeline) if entry.pipeline else diffusers.AutoPipelineForText2Image
            text = loader.from_pretrained(entry.source, **arguments)
            pair = Pair(entry=entry, text=text, image=image_pipeline(entry, text))
    except ModmError:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"model {entry.name!r}: out of memory while loading") from error
    except Exception as error:
        raise EngineError(explain(entry, error)) from error
    for pipeline in (pair.text, pair.image):
        pipeline.set_progress_bar_config(disable=True)
    apply_options(pair.text, options, device)
    return pair


def absent_parts(folder: Path) -> list[str]:
    """Components that a saved pipeline does without, e.g. a Stable Diffusion 3 without T5.

    `from_pretrained` takes their absence for damage unless it is told that they are None.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers, str(index["_class_name"]), None)
    wanted = inspect.signature(kind.__init__).parameters if kind is not None else {}
    saved = {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    return [
        name
        for name, parameter in wanted.items()
        if name != "self"
        and parameter.default is inspect.Parameter.empty
        and name not in saved
        and (index.get(name) or [None])[0] is None
    ]


def image_pipeline(entry: ModelEntry, text: Any) -> Any:
    """The image-to-image pipeline over the same components. The scheduler is copied: it has state of its own."""
    if entry.image_pipeline and entry.image_pipeline != "sana-img2img":
        kind = _class(entry, entry.image_pipeline)
    elif isinstance(text, diffusers.SanaPipeline):
        from workers.sana_img2img import SanaImg2ImgPipeline as kind
    elif isinstance(text, diffusers.SanaSprintPipeline):
        kind = diffusers.SanaSprintImg2ImgPipeline
    else:
        kind = type(diffusers.AutoPipelineForImage2Image.from_pipe(text))
    scheduler = type(text.scheduler).from_config(text.scheduler.config)
    # Not from_pipe: it casts the shared weights to float32.
    parts = {k: v for k, v in text.components.items() if k in inspect.signature(kind.__init__).parameters}
    return kind(**(parts | {"scheduler": scheduler}))


def _class(entry: ModelEntry, name: str) -> Any:
    found = getattr(diffusers, name, None)
    if found is None:
        raise ConfigError(f"model {entry.name!r}: this diffusers has no class {name!r}", field="pipeline")
    return found


def size_multiple(pipeline: Any) -> int:
    """Sides must be multiples of this many pixels: the VAE's reduction times the denoiser's patch."""
    factor = int(pipeline.vae_scale_factor)
    if type(pipeline).__name__.startswith("Sana"):
        return max(32, factor)  # checked by the pipeline itself
    if getattr(pipeline, "unet", None) is not None:
        return factor
    if type(pipeline).__name__.startswith(("Flux", "ZImage", "QwenImage")):
        return 2 * factor  # these pack 2x2 latents into one token
    return factor * int(getattr(pipeline.transformer.config, "patch_size", 1) or 1)


def fewest_steps(pipeline: Any) -> int:
    """A schedule that is stretched to end at a given sigma (Qwen-Image) has no meaning with one step: 0 / 0."""
    return 2 if pipeline.scheduler.config.get("shift_terminal") else 1


def exact_strength(pipeline: Any, start: int, steps: int) -> float:
    """The ``strength`` that makes this pipeline begin at step ``start`` of ``steps``: 1 - k/T, nudged.

    diffusers rounds T * strength (UNet families) or T - T * strength (the others) down, and 1 - k/T is seldom exact in
    binary, so that without the nudge some k come out one step off.
    """
    from workers.sana_img2img import SanaImg2ImgPipeline

    down = getattr(pipeline, "unet", None) is not None or isinstance(pipeline, SanaImg2ImgPipeline)
    return min(1.0, 1 - start / steps + (1e-9 if down else -1e-9))


def call_arguments(
    pair: Pair, pipeline: Any, *, prompt: str, negative_prompt: str, guidance_scale: float | None, seed: int
) -> dict[str, Any]:
    """What this family takes: its own guidance, a negative prompt where it has an effect, the seed."""
    entry, accepted = pair.entry, inspect.signature(type(pipeline).__call__).parameters
    guidance = entry.guidance_scale if guidance_scale is None else guidance_scale
    out: dict[str, Any] = {"prompt": prompt, "generator": torch.Generator("cpu").manual_seed(seed)}
    if entry.guidance_kwarg in accepted:
        out[entry.guidance_kwarg] = guidance
    # With a true_cfg_scale that is not ours to set, guidance is distilled and a negative prompt would be ignored.
    if "negative_prompt" in accepted and ("true_cfg_scale" not in accepted or "true_cfg_scale" in out):
        out["negative_prompt"] = negative_prompt or (" " if "true_cfg_scale" in out and guidance > 1 else "")
    if out.get("true_cfg_scale", 2) <= 1:
        out.pop("negative_prompt", None)
    if entry.max_sequence_length is not None and "max_sequence_length" in accepted:
        out["max_sequence_length"] = entry.max_sequence_length
    if "use_resolution_binning" in accepted:
        out["use_resolution_binning"] = False
    return out


def draw(
    pair: Pair,
    *,
    prompt: str,
    seed: int,
    steps: int,
    size: tuple[int, int],
    negative_prompt: str = "",
    guidance_scale: float | None = None,
    source: Image.Image | None = None,
    start: int = 0,
    on_step: StepCallback,
) -> tuple[Image.Image, int]:
    """Run one pipeline: (RGB image of exactly ``size``, steps run).

    Sides that the family cannot draw are drawn larger and cropped in the middle. Raises what ``on_step`` raises,
    OutOfMemoryError, or EngineError.
    """
    pipeline = pair.text if source is None else pair.image
    multiple = size_multiple(pipeline)
    width, height = (-(-side // multiple) * multiple for side in size)
    arguments = call_arguments(
        pair, pipeline, prompt=prompt, negative_prompt=negative_prompt, guidance_scale=guidance_scale, seed=seed
    )
    accepted = inspect.signature(type(pipeline).__call__).parameters
    arguments |= {k: v for k, v in {"width": width, "height": height}.items() if k in accepted}
    if source is not None:
        resized = source.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        arguments |= {"image": resized, "strength": exact_strength(pipeline, start, steps)}
    if "intermediate_timesteps" in accepted and steps != 2:
        arguments["intermediate_timesteps"] = None
    counter = _Counter(on_step, steps - start)
    try:
        with quiet(), exact_timesteps(pipeline):
            image = pipeline(num_inference_steps=steps, callback_on_step_end=counter, **arguments).images[0]
    except ModmError:
        raise
    except torch.OutOfMemoryError as error:
        where = f"model {pair.entry.name!r}, {width}x{height}"
        raise OutOfMemoryError(f"{where}: the device is out of memory") from error
    except Exception as error:
        raise EngineError(f"model {pair.entry.name!r}: {type(error).__name__}: {first_line(error)}") from error
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return image.convert("RGB").crop((left, top, left + size[0], top + size[1])), counter.done


class _Counter:
    """The callback given to diffusers: counts the steps that really ran and passes progress on."""

    def __init__(self, on_step: StepCallback, total: int) -> None:
        self.done = 0
        self._on_step, self._total = on_step, total

    def __call__(self, pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.done += 1
        self._on_step(self.done, max(self._total, self.done))
        return kwargs


@contextlib.contextmanager
def exact_timesteps(pipeline: Any) -> Iterator[None]:
    """Give FLUX and Qwen-Image their timesteps in float32.

    Their pipelines cast the timestep to the latents' type; bfloat16 has 8 bits, so a step at 731.4 becomes 732. The
    other families keep float32 by themselves. Compiled denoisers are left alone: a hook would compile them anew.
    """
    model = denoiser(pipeline)
    scale = {"FluxTransformer2DModel": 1.0, "QwenImageTransformer2DModel": 1e-3}.get(type(model).__name__)
    if scale is None or model.dtype == torch.float32 or getattr(model, "_compiled_call_impl", None) is not None:
        yield
        return
    scheduler = pipeline.scheduler

    def replace(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        exact = scheduler.timesteps[index].to(args[0].device, torch.float32) * scale
        return (exact.expand(args[0].shape), *args[1:])

    handle = model.time_text_embed.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation notes of libraries about one another, which a user can do nothing about."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"huggingface_hub\..*")
        yield
