"""The family's autoencoder: 64x64 pixels <-> 16x16x4 latents, shared by `scenes-large` and `scenes-small`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from ops.scenes.loop import StageConfig, StepRandom, bf16, run_stage
from ops.scenes.render import render_array
from ops.scenes.scene import sample_scene

LATENT_CHANNELS = 4
STAGE = StageConfig(name="vae", steps=3600, learning_rate=2.5e-3, ema=0.995, decay=0.5)
BATCH = 24


def make_vae() -> AutoencoderKL:
    """f4, (16, 32, 64) channels, no attention in the middle.

    One normalisation group: with few channels per group the absolute colour would be divided out.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) -> float (n, 3, 64, 64) in [-1, 1], channels last in memory."""
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return tensor.contiguous(memory_format=torch.channels_last)


def train_vae(folder: Path, config: StageConfig = STAGE, *, stop_after: int | None = None) -> None:
    """Trains on endless fresh pictures (rendering one costs 0.1 ms), then fixes the scale of the latents."""
    torch.manual_seed(config.seed)
    vae = make_vae().to(memory_format=torch.channels_last)

    def step(index: int, rng: StepRandom) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = [sample_scene(rng.numpy) for _ in range(BATCH)]
        pixels = np.stack([render_array(s, int(rng.numpy.integers(2**31))) for s in scenes])
        target = to_tensor(pixels)
        with bf16():
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=rng.torch)
            latents = posterior.mean + noise * posterior.std
            output = vae.decode(latents).sample.float()
        squared = F.mse_loss(output, target)
        edges = F.l1_loss(output.diff(dim=-1), target.diff(dim=-1)) + F.l1_loss(
            output.diff(dim=-2), target.diff(dim=-2)
        )
        loss = F.l1_loss(output, target) + squared + 0.5 * edges + 1e-5 * posterior.kl().float().mean() / 256
        return loss, {"psnr": float(10 * torch.log10(4 / squared.detach()))}

    run_stage(config, {"vae": vae}, step, folder, stop_after=stop_after)


def finished_vae(state: dict[str, torch.Tensor]) -> AutoencoderKL:
    """The trained VAE with latents of mean 0 and deviation 1, by folding both into the 1x1 convolutions.

    Then `scaling_factor` is 1 and `shift_factor` 0, and pipelines that know only one of the two agree.
    """
    vae = make_vae()
    vae.load_state_dict(state)
    vae.eval()
    rng = np.random.default_rng(5)
    pixels = np.stack([render_array(sample_scene(rng), i) for i in range(512)])
    with torch.no_grad():
        latents = encode(vae, pixels)
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        quant, post = vae.quant_conv, vae.post_quant_conv
        # Channels 0-3 of the moments are the means, 4-7 the log variances.
        quant.bias[:LATENT_CHANNELS] = (quant.bias[:LATENT_CHANNELS] - mean) / std
        quant.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
        quant.bias[LATENT_CHANNELS:] -= 2 * std.log()
        post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mean)
        post.weight *= std[None, :, None, None]
    return vae


def encode(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 64) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) -> float latents (n, 4, 16, 16), the means of the posterior."""
    with torch.no_grad():
        parts = [vae.encode(to_tensor(pixels[i : i + batch])).latent_dist.mean for i in range(0, len(pixels), batch)]
    return torch.cat(parts)
