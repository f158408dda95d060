"""The independent judge: a small CNN that reads a scene's attributes off a picture.

It is trained on rendered scenes (all combinations, held-out ones too) and shares nothing with the CLIP or the diffusion
models. Rendered pictures are blurred, shifted in tone, made noisy and partly sent through the autoencoder, so that it
judges what a generated picture shows and not whether its pixels look rendered.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ops.scenes.loop import StageConfig, StepRandom, bf16, load_average, run_stage
from ops.scenes.render import render_array
from ops.scenes.scene import CODE_COLUMNS, CODE_SIZES, Scene, sample_scene
from ops.scenes.text import attribute_loss
from ops.scenes.vae import finished_vae, to_tensor

WEIGHTS = Path(__file__).parent / "data" / "classifier.safetensors"
STAGE = StageConfig(name="classifier", steps=1500, learning_rate=2e-3, ema=0.99, decay=0.6)
BATCH = 96
#: Code columns that belong to each judged attribute.
COLUMNS = {
    "background": (0,),
    "texture": (1,),
    "layout": (2,),
    "shape": (3, 6),
    "colour": (4, 7),
    "size": (5, 8),
}


class SceneClassifier(nn.Module):
    """Five convolutions and one head per code column; the 4x4 grid is kept, as "where" is part of the question."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96, 96)
        layers: list[nn.Module] = []
        for index, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if index == 4 else 2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 192), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(192, size) for size in CODE_SIZES)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(n, 3, 64, 64) in [-1, 1] -> logits (n, values) per code column."""
        features = self.features(pixels)
        return [head(features) for head in self.heads]


def train_classifier(folder: Path, config: StageConfig = STAGE, *, stop_after: int | None = None) -> None:
    torch.manual_seed(config.seed)
    model = SceneClassifier().to(memory_format=torch.channels_last)
    vae = finished_vae(load_average(folder, "vae")["vae"]).requires_grad_(False)

    def step(index: int, rng: StepRandom) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = [sample_scene(rng.numpy, allow_held_out=True) for _ in range(BATCH)]
        pixels = to_tensor(np.stack([render_array(s, int(rng.numpy.integers(2**31))) for s in scenes]))
        codes = torch.tensor([s.codes() for s in scenes])
        with bf16():
            logits = model(_worn(pixels, vae, rng))
        loss, accuracy = attribute_loss(logits, codes)
        return loss, {"accuracy": accuracy}

    run_stage(config, {"classifier": model}, step, folder, stop_after=stop_after)


def _worn(pixels: torch.Tensor, vae: nn.Module, rng: StepRandom) -> torch.Tensor:
    """A third through the autoencoder with disturbed latents, a third blurred; all with noise and shifted tones."""
    n, g = len(pixels), rng.torch
    third = n // 3
    out = pixels.clone()
    strength = 0.25 * torch.rand(third, 1, 1, 1, generator=g)
    with torch.no_grad():
        latents = vae.encode(pixels[:third]).latent_dist.mean
        out[:third] = vae.decode(latents + strength * torch.randn(latents.shape, generator=g)).sample
    soft = F.interpolate(F.avg_pool2d(pixels[third : 2 * third], 2), scale_factor=2, mode="bilinear")
    out[third : 2 * third] = soft
    out = out * (1 + 0.1 * torch.randn(n, 3, 1, 1, generator=g)) + 0.05 * torch.randn(n, 3, 1, 1, generator=g)
    out = out + 0.08 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(out.shape, generator=g)
    return out.clamp(-1, 1)


def export_classifier(folder: Path, target: Path = WEIGHTS) -> None:
    state = load_average(folder, "classifier")["classifier"]
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in state.items()}, target)


@lru_cache(maxsize=1)
def load_classifier(path: Path = WEIGHTS) -> SceneClassifier:
    model = SceneClassifier()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    model.eval()
    return model


def predict(images: Sequence[Image.Image]) -> np.ndarray:
    """-> int codes (n, 9) in the order of `CODE_COLUMNS`; slot 1 is filled in even where there is one object."""
    pixels = np.stack([np.asarray(image.convert("RGB").resize((64, 64))) for image in images])
    model = load_classifier()
    found = []
    with torch.no_grad():
        for start in range(0, len(pixels), 128):
            found.append(torch.stack([x.argmax(-1) for x in model(to_tensor(pixels[start : start + 128]))], 1))
    codes: np.ndarray = torch.cat(found).numpy()
    return codes


def attribute_accuracy(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Per attribute, one number in 0..1 a picture: the share of its objects for which the attribute is right.

    The key "mean" holds the mean over the attributes of each picture: what the bars of the model card are about.
    Pictures are paired with the scenes that their prompts asked for.
    """
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes")
    wanted = np.array([s.codes() for s in scenes]).reshape(len(scenes), len(CODE_COLUMNS))
    right = np.where(wanted < 0, np.nan, predict(images) == wanted)
    out = {name: np.nanmean(right[:, columns], axis=1) for name, columns in COLUMNS.items()}
    out["mean"] = np.mean(list(out.values()), axis=0)
    return out
