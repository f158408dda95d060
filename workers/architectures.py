"""Pipelines of every supported family with random weights, tiny or at full size.

Tiny ones serve tests and dry runs: real classes, real loading and refining, seconds on a CPU. Full-size ones serve
`make bench-gpu`: timing and memory depend on shapes, not on weights. Full-size figures are those of the published
configurations (Stable Diffusion 3.5 Large, FLUX.1-dev, SDXL base 1.0, SANA 1600M); only the tokenizers differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from workers import tokenizers
from workers.architecture_parts import Scale, clip, flow, kl_vae, on_cpu, t5


def sd3(scale: Scale) -> Any:
    """Stable Diffusion 3.5 Large: 38-block MMDiT, CLIP-L, CLIP-G and T5-XXL."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    full = {"sample_size": 128, "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38} | {
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
    tiny = {"sample_size": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2} | {
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 32,
    }
    transformer = SD3Transformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, qk_norm="rms_norm", **(full if scale == "full" else tiny)
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0),
        vae=kl_vae(scale, channels=16, scaling=1.5305, shift=0.0609, quant=False),
        text_encoder=clip(scale, full=(768, 12, 12, 768)),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=clip(scale, full=(1280, 32, 20, 1280)),
        tokenizer_2=tokenizers.clip_tokenizer(),
        text_encoder_3=t5(scale),
        tokenizer_3=tokenizers.t5_tokenizer(),
    )


def flux(scale: Scale) -> Any:
    """FLUX.1-dev: 19 double and 38 single blocks, distilled guidance."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    full = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24} | {
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
    }
    tiny = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2} | {
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    }
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, guidance_embeds=True, **(full if scale == "full" else tiny)
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=kl_vae(scale, channels=16, scaling=0.3611, shift=0.1159, quant=False),
        text_encoder=clip(scale, full=(768, 12, 12, 768), with_projection=False),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=t5(scale),
        tokenizer_2=tokenizers.t5_tokenizer(),
    )


def sdxl(scale: Scale) -> Any:
    """SDXL base 1.0: UNet with 1, 2 and 10 transformer layers per level."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    full = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2} | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    tiny = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1} | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    }
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        addition_embed_type="text_time",
        use_linear_projection=True,
        norm_num_groups=32 if scale == "full" else 4,
        **(full if scale == "full" else tiny),
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=on_cpu(
            EulerDiscreteScheduler,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        vae=kl_vae(scale, channels=4, scaling=0.13025, shift=None, quant=True),
        text_encoder=clip(scale, full=(768, 12, 12, 768), with_projection=False),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=clip(scale, full=(1280, 32, 20, 1280)),
        tokenizer_2=tokenizers.clip_tokenizer(),
        add_watermarker=False,
    )


def _sana_parts(scale: Scale, *, sprint: bool = False) -> dict[str, Any]:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tiny_transformer = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "sample_size": 8} | {
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
    }
    distilled = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1.0} if sprint else {}
    if scale == "full":
        transformer = SanaTransformer2DModel(**distilled)  # the class's defaults are SANA 1600M
        types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        vae = AutoencoderDC(
            encoder_block_types=types,
            decoder_block_types=types,
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
        )
        gemma = Gemma2Config(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4)
    else:
        transformer = SanaTransformer2DModel(in_channels=4, out_channels=4, **tiny_transformer, **distilled)
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
        )
        gemma = Gemma2Config(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": Gemma2Model(gemma),
        "tokenizer": tokenizers.gemma_tokenizer(),
    }


def sana(scale: Scale) -> Any:
    """SANA 1600M: linear-attention transformer on 32-fold compressed latents, Gemma 2 2B."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = on_cpu(
        DPMSolverMultistepScheduler,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        beta_schedule="linear",
        solver_order=2,
        algorithm_type="dpmsolver++",
    )
    return SanaPipeline(scheduler=scheduler, **_sana_parts(scale))


def sana_sprint(scale: Scale) -> Any:
    """SANA-Sprint: the same shapes, distilled to 1-4 steps."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    return SanaSprintPipeline(scheduler=on_cpu(SCMScheduler), **_sana_parts(scale, sprint=True))


def z_image(scale: Scale) -> Any:
    """Z-Image: single-stream transformer, Qwen3 4B text encoder."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    if scale == "full":
        transformer = ZImageTransformer2DModel()
        text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    else:
        transformer = ZImageTransformer2DModel(
            dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
        )  # fmt: skip
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 320}
        text |= {"bos_token_id": 0, "eos_token_id": 0}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return ZImagePipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0),
        vae=kl_vae(scale, channels=16, scaling=0.3611, shift=0.1159, quant=False),
        text_encoder=Qwen3Model(Qwen3Config(**text, **heads)),
        tokenizer=tokenizers.qwen_tokenizer(),
    )


def qwen_image(scale: Scale) -> Any:
    """Qwen-Image: 60-block MMDiT, Qwen2.5-VL 7B. Tiny only: at full size it needs more than most single GPUs have."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if scale == "full":
        raise ValueError("qwen-image is built tiny only")
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizers.qwen_tokenizer(),
    )


FAMILIES: dict[str, Callable[[Scale], Any]] = {
    "sd3": sd3,
    "flux": flux,
    "sdxl": sdxl,
    "sana": sana,
    "sana-sprint": sana_sprint,
    "z-image": z_image,
    "qwen-image": qwen_image,
}


def build(
    family: str, scale: Scale = "tiny", *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A pipeline with random weights, the same for the same seed. Raises KeyError for an unknown family.

    Weights are drawn on ``device``: billions of them take minutes on a CPU and a second on a GPU.
    """
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            pipeline = FAMILIES[family](scale)
    finally:
        torch.set_default_dtype(kept)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
