"""What settings do to a loaded pipeline: speed and memory options. Defaults change nothing.

Each option says in one line why it cannot be had, instead of failing inside a library.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from modm_tasks.errors import ConfigError
from modm_tasks.settings import WorkerSettings

#: Packages that an option needs beyond the project's own.
_NEEDS = {"offload": ("accelerate",), "quantise": ("bitsandbytes", "accelerate")}


def check_options(options: WorkerSettings, device: torch.device) -> None:
    """Raise ConfigError for what this machine cannot do."""
    for field, value in (("offload", options.offload), ("quantise", options.quantise)):
        if value in {"", "none"}:
            continue
        if device.type != "cuda":
            raise ConfigError(f"worker.{field} = {value!r} needs a GPU; this worker runs on {device.type}", field=field)
        if missing := [package for package in _NEEDS[field] if importlib.util.find_spec(package) is None]:
            packages = " ".join(missing)
            raise ConfigError(f"worker.{field} = {value!r} needs more: pip install {packages}", field=field)


def load_arguments(options: WorkerSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Further arguments of `from_pretrained`: quantisation by diffusers' own config, of all but the VAE."""
    if not options.quantise:
        return {}
    from diffusers import PipelineQuantizationConfig

    kwargs: dict[str, Any] = {"load_in_8bit": True}
    if options.quantise == "int4":
        kwargs = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{'4' if options.quantise == 'int4' else '8'}bit",
        quant_kwargs=kwargs,
        components_to_quantize=["transformer", "unet", "text_encoder_2", "text_encoder_3"],
    )
    return {"quantization_config": config}


def denoiser(pipeline: Any) -> Any:
    """The part that runs every step."""
    return getattr(pipeline, "transformer", None) or pipeline.unet


def _channels_last(model: torch.nn.Module) -> None:
    """Weights of two-dimensional convolutions. `Module.to` would also try those of three, and fail (Qwen-Image's VAE)."""
    for weights in model.parameters():
        if weights.dim() == 4:
            weights.data = weights.data.contiguous(memory_format=torch.channels_last)


def apply_options(pipeline: Any, options: WorkerSettings, device: torch.device) -> None:
    """Apply what is set, in the order that works: memory format, VAE, attention, offload, compile.

    Raises ConfigError for an attention backend that diffusers does not know or that lacks its package.
    """
    model = denoiser(pipeline)
    if options.channels_last:
        for part in (model, pipeline.vae):
            _channels_last(part)
    if options.vae_slicing and hasattr(pipeline.vae, "enable_slicing"):
        pipeline.vae.enable_slicing()
    if options.vae_tiling and hasattr(pipeline.vae, "enable_tiling"):
        pipeline.vae.enable_tiling()
    if options.attention_backend:
        try:
            model.set_attention_backend(options.attention_backend)
        except (ValueError, RuntimeError, ImportError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"worker.attention_backend = {options.attention_backend!r}: {reason}", field="attention_backend"
            ) from error
    if options.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif options.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    if options.compile:
        model.compile(dynamic=False)  # in place, so that both pipelines of the model use the compiled forward
