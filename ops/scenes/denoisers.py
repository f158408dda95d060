"""The two denoisers, and the objective they share.

Both are SD3 transformers (MMDiT) that learn flow matching (predict noise minus picture at a noise level sigma in 0..1).
`scenes-large` is trained shallow and then grown to nine layers; `scenes-small` has two, narrower ones. Measured and
dropped: a Stable Diffusion UNet as the small model (on one CPU thread the least that was worth training took 8-10 ms a
guided step, against 3.7 ms: a large model four times slower would miss its own budget), and two layers of width 64
(after 3,900 steps .907 from noise, and refining no better than .95 of large: no rung of the ladder would stand).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from ops.scenes.captions import caption
from ops.scenes.loop import StageConfig, StepRandom, bf16, load_average, rank_and_world, run_stage
from ops.scenes.render import render_array
from ops.scenes.scene import sample_scene, scene_from_codes
from ops.scenes.text import WIDTH, load_tokenizer, make_text_encoders, tokenize
from ops.scenes.vae import LATENT_CHANNELS, encode, finished_vae

BATCH = 64
BANK_SIZE = 60_000
LATENT_SIZE = 16
#: Share of samples that see an empty prompt, for classifier-free guidance.
PROMPT_DROPOUT = 0.1
#: Tokens of the absent T5 encoder that pipelines pad with; one is the least that they accept.
T5_TOKENS = 1
#: Trained at four layers first, then grown; nine cost one CPU second an image.
SHALLOW_LAYERS, LARGE_LAYERS = 4, 9

Denoise = Callable[[torch.Tensor, torch.Tensor, list[str]], torch.Tensor]


def make_mmdit(layers: int, width: int) -> SD3Transformer2DModel:
    """An MMDiT over 64 picture tokens and 25 text tokens; `width` in steps of 32 (the width of one attention head)."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def make_large(layers: int = LARGE_LAYERS) -> SD3Transformer2DModel:
    return make_mmdit(layers, 128)


def make_small() -> SD3Transformer2DModel:
    return make_mmdit(2, 96)


def grow(shallow: dict[str, torch.Tensor], old_layers: int, new_layers: int) -> dict[str, torch.Tensor]:
    """Weights of a deeper MMDiT that computes the same function as the trained shallow one.

    Each added block is a copy of the block before it with its gates (the parts of the adaptive normalisation that scale
    what attention and feed-forward add) at zero. The last block stays last: it alone drops the text stream.
    """
    target: dict[str, torch.Tensor] = make_large(new_layers).state_dict()
    added = new_layers - old_layers
    # New blocks go after old blocks 0, 1, ... evenly, never after the last.
    order: list[tuple[int, bool]] = []
    for index in range(old_layers):
        order.append((index, False))
        share = added // (old_layers - 1) + (1 if index < added % (old_layers - 1) else 0)
        if index < old_layers - 1:
            order += [(index, True)] * share
    for key in target:
        if not key.startswith("transformer_blocks."):
            target[key] = shallow[key]
            continue
        _, number, rest = key.split(".", 2)
        source, is_new = order[int(number)]
        value = shallow[f"transformer_blocks.{source}.{rest}"].clone()
        if is_new and rest.startswith(("norm1.linear.", "norm1_context.linear.")):
            width = value.shape[0] // 6
            value[2 * width : 3 * width] = 0  # gate of attention
            value[5 * width :] = 0  # gate of the feed-forward part
        target[key] = value
    return target


@dataclass(frozen=True)
class Bank:
    """Precomputed training pictures: float16 latents (n, 4, 16, 16) and int8 scene codes (n, 9)."""

    latents: np.ndarray
    codes: np.ndarray


def load_bank(folder: Path, seed: int = 11, size: int = BANK_SIZE) -> Bank:
    """Reads the bank, or renders and encodes it first (about two minutes)."""
    path = folder / "bank.npz"
    if not path.exists():
        vae = finished_vae_from(folder)
        rng = np.random.default_rng(seed)
        scenes = [sample_scene(rng) for _ in range(size)]
        latents = []
        for start in range(0, size, 500):
            pixels = [render_array(s, seed + start + i) for i, s in enumerate(scenes[start : start + 500])]
            latents.append(encode(vae, np.stack(pixels)).half().numpy())
        codes = np.array([s.codes() for s in scenes], dtype=np.int8)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, latents=np.concatenate(latents), codes=codes)
        temporary.replace(path)
    with np.load(path) as data:
        return Bank(data["latents"], data["codes"])


class FrozenText:
    """The pretrained encoders, fixed, giving each denoiser what its pipeline will give it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: CLIPTokenizer = load_tokenizer(folder / "tokenizer")
        self.encoders = make_text_encoders(self.tokenizer)
        states = load_average(folder, "text")
        for name, encoder in self.encoders.items():
            encoder.load_state_dict(states[name])
            encoder.eval().requires_grad_(False)

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> hidden states (n, 25, 128) as `StableDiffusion3Pipeline` builds them, pooled (n, 128)."""
        ids = tokenize(self.tokenizer, texts)
        with torch.no_grad():
            outs = [self.encoders[n](ids, output_hidden_states=True) for n in ("clip_l", "clip_g")]
        hidden = torch.cat([o.hidden_states[-2] for o in outs], -1)
        absent = hidden.new_zeros(len(texts), T5_TOKENS, hidden.shape[-1])
        return torch.cat([hidden, absent], 1), torch.cat([o.text_embeds for o in outs], -1)


def denoise_with(model: nn.Module, text: FrozenText) -> Denoise:
    def call(noisy: torch.Tensor, timestep: torch.Tensor, texts: list[str]) -> torch.Tensor:
        hidden, pooled = text.encode(texts)
        out: torch.Tensor = model(
            hidden_states=noisy, timestep=timestep, encoder_hidden_states=hidden, pooled_projections=pooled
        ).sample
        return out

    return call


def train_denoiser(
    folder: Path,
    config: StageConfig,
    model: nn.Module,
    denoise: Denoise,
    bank: Bank,
    *,
    fresh: dict[str, torch.Tensor] | None = None,
    stop_after: int | None = None,
) -> None:
    """Flow matching on the bank. Every sample is told in a fresh phrasing."""
    rank, world = rank_and_world()

    def step(index: int, rng: StepRandom) -> tuple[torch.Tensor, dict[str, float]]:
        rows = rng.numpy.integers(len(bank.codes), size=BATCH)
        clean = torch.from_numpy(bank.latents[rows]).float()
        dropped = rng.numpy.random(BATCH) < PROMPT_DROPOUT
        texts = [
            "" if out else caption(scene_from_codes(c), rng.numpy)
            for out, c in zip(dropped, bank.codes[rows], strict=True)
        ]
        noise = torch.randn(clean.shape, generator=rng.torch)
        # Half logit-normal (the middle is hardest), half uniform (so that both ends are seen often enough).
        middle = torch.sigmoid(torch.randn(BATCH, generator=rng.torch))
        uniform = torch.rand(BATCH, generator=rng.torch)
        sigma = torch.where(torch.arange(BATCH) % 2 == 0, middle, uniform)
        # Drawn for the whole batch and then cut: the steps are the same however many processes share them.
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        clean, noise, sigma, texts = clean[part], noise[part], sigma[part], texts[part]
        s = sigma[:, None, None, None]
        with bf16():
            predicted = denoise((1 - s) * clean + s * noise, sigma * 1000, texts)
        loss = F.mse_loss(predicted.float(), noise - clean)
        return loss, {}

    fresh_from = {"denoiser": fresh} if fresh is not None else None
    run_stage(config, {"denoiser": model}, step, folder, stop_after=stop_after, fresh_from=fresh_from)


SHALLOW_STAGE = StageConfig(name="large-shallow", steps=1700, learning_rate=1.2e-3, decay=0.0)
LARGE_STAGE = StageConfig(name="large", steps=880, learning_rate=1.2e-3, decay=0.38)
#: Stopped before its rate has fallen. It is still nearly as good from noise as the large model; one that is clearly
#: worse (stop at 3,000: .967) refines no better either, and its ladder begins at near repeats: decision record 0009.
SMALL_STAGE = StageConfig(name="small", steps=5000, learning_rate=2e-3, decay=0.5, stop_at=3653)


def train_large(folder: Path) -> None:
    """Four layers first, which learn twice as fast a second, then nine that start from what the four learned."""
    bank, text = load_bank(folder), FrozenText(folder)
    torch.manual_seed(SHALLOW_STAGE.seed)
    shallow = make_large(SHALLOW_LAYERS)
    train_denoiser(folder, SHALLOW_STAGE, shallow, denoise_with(shallow, text), bank)
    grown = grow(load_average(folder, SHALLOW_STAGE.name)["denoiser"], SHALLOW_LAYERS, LARGE_LAYERS)
    model = make_large()
    train_denoiser(folder, LARGE_STAGE, model, denoise_with(model, text), bank, fresh=grown)


def train_small(folder: Path) -> None:
    text = FrozenText(folder)
    torch.manual_seed(SMALL_STAGE.seed)
    model = make_small()
    train_denoiser(folder, SMALL_STAGE, model, denoise_with(model, text), load_bank(folder))


def finished_vae_from(folder: Path) -> AutoencoderKL:
    """The VAE with normalised latents: as shipped where `start_from_shipped` put it, else from the trained one."""
    if (folder / "vae").is_dir():
        # Without accelerate anything else is a warning of four lines.
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(
            str(folder / "vae"), torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        return vae.eval()
    return finished_vae(load_average(folder, "vae")["vae"])


def start_from_shipped(shipped: Path, folder: Path) -> None:
    """Puts the VAE, the text encoders and their tokenizer of a shipped pipeline where the denoisers' stages look.

    One denoiser can then be trained again without the hours of all that comes before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("vae", "vae"), ("tokenizer", "tokenizer")):
        shutil.copytree(shipped / name, folder / target, dirs_exist_ok=True)
    average: dict[str, torch.Tensor] = {}
    for name, sub in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        state = load_file(shipped / sub / "model.safetensors")
        average |= {f"{name}.{key}": value.float() for key, value in state.items()}
    torch.save({"average": average}, folder / "text.pt")
