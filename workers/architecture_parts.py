"""The parts that several families are made of: text encoders, autoencoder, schedulers; tiny, or of the published size."""

from __future__ import annotations

from typing import Any, Literal

import torch

Scale = Literal["tiny", "full"]


def clip(scale: Scale, *, full: tuple[int, int, int, int], with_projection: bool = True) -> Any:
    """A CLIP text encoder; ``full`` = hidden size, layers, heads, projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    hidden, layers, heads, projection = full if scale == "full" else (16, 2, 2, 16)
    config = CLIPTextConfig(
        vocab_size=49408 if scale == "full" else 256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        max_position_embeddings=77,
        hidden_act="gelu" if hidden == 1280 else "quick_gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if with_projection else CLIPTextModel(config)


def t5(scale: Scale) -> Any:
    from transformers import T5Config, T5EncoderModel

    full = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    tiny = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 256}
    sizes = full if scale == "full" else tiny
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))


def kl_vae(scale: Scale, *, channels: int, scaling: float, shift: float | None, quant: bool) -> Any:
    from diffusers import AutoencoderKL

    blocks = (128, 256, 512, 512) if scale == "full" else (8, 8)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=2 if scale == "full" else 1,
        norm_num_groups=32 if scale == "full" else 4,
        latent_channels=channels,
        sample_size=1024 if scale == "full" else 32,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


def flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return on_cpu(FlowMatchEulerDiscreteScheduler, **config)


def on_cpu(scheduler: Any, **config: Any) -> Any:
    """Schedulers hand their tables to numpy, so those stay in host memory whatever device the weights are drawn on."""
    with torch.device("cpu"):
        return scheduler(**config)
