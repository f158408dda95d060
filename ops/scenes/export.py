"""Turns checkpoints into what is shipped: fp16 safetensors in folders that diffusers and open_clip load plainly."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ops.scenes.clip import NAME as CLIP_NAME
from ops.scenes.clip import full_state, write_config
from ops.scenes.denoisers import T5_TOKENS, FrozenText, finished_vae_from, make_large, make_small
from ops.scenes.loop import load_average
from ops.scenes.text import WIDTH

ROOT = Path(__file__).resolve().parents[2]
CLIP_FOLDER = ROOT / "vector_store" / "weights" / CLIP_NAME
DIFFUSION_FOLDER = ROOT / "workers" / "weights"
LARGE, SMALL = "scenes-large", "scenes-small"
GUIDANCE = {LARGE: 2.5, SMALL: 2.5}
STEPS = 50


def export_clip(checkpoints: Path, target: Path = CLIP_FOLDER) -> None:
    """`scenes-clip.json` (config), `scenes-clip.safetensors`, for open_clip's `add_model_config` and `pretrained=`."""
    target.mkdir(parents=True, exist_ok=True)
    state = full_state(load_average(checkpoints, "clip")["clip"])
    save_file({k: v.half().contiguous() for k, v in state.items()}, target / f"{CLIP_NAME}.safetensors")
    write_config(target)


def export_diffusion(checkpoints: Path, name: str, *, stage: str | None = None, target: Path | None = None) -> None:
    """One `StableDiffusion3Pipeline` folder; `stage` names another checkpoint (tests, early looks).

    The folder is written beside and swapped in, so that a process that loads it never sees half of it.
    """
    text = FrozenText(checkpoints)
    denoiser = make_large() if name == LARGE else make_small()
    denoiser.load_state_dict(load_average(checkpoints, stage or name.removeprefix("scenes-"))["denoiser"])
    write_pipeline(name, denoiser, text, finished_vae_from(checkpoints), target or DIFFUSION_FOLDER / name)


def write_pipeline(name: str, denoiser: nn.Module, text: FrozenText, vae: nn.Module, folder: Path) -> None:
    left, right = text.encoders["clip_l"], text.encoders["clip_g"]
    assert isinstance(left, CLIPTextModelWithProjection)
    assert isinstance(right, CLIPTextModelWithProjection)
    pipeline = StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae,
        text_encoder=left,
        tokenizer=text.tokenizer,
        text_encoder_2=right,
        tokenizer_2=text.tokenizer,
        text_encoder_3=_silent_t5(),
        tokenizer_3=_one_token_tokenizer(),
    )
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(str(new), max_shard_size="14MB")
    settings = {
        "name": name,
        "steps": STEPS,
        "guidance_scale": GUIDANCE[name],
        "size": 64,
        "max_sequence_length": T5_TOKENS,
    }
    (new / "modm.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _silent_t5() -> T5EncoderModel:
    """A T5 encoder of a few thousand weights whose output is zero, as its last normalisation multiplies by zero.

    `StableDiffusion3Pipeline` stands in zeros for an absent T5, but `from_pretrained` insists on one unless the caller
    passes `text_encoder_3=None`. With this stand-in a plain load works and computes the very same.
    """
    config = T5Config(vocab_size=3, d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    for parameter in encoder.parameters():
        # All of them, so that two exports of the same checkpoint are the same bytes.
        torch.nn.init.zeros_(parameter)
    return encoder.eval()


def _one_token_tokenizer() -> PreTrainedTokenizerFast:
    """Any text -> one end token, so that nothing is "truncated" at `max_sequence_length=1` (which would be logged)."""
    inner = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    inner.normalizer = Replace(Regex(r"[\s\S]+"), "")
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def weight_files(root: Path = ROOT) -> dict[str, dict[str, object]]:
    """Path below the checkout -> {"sha256", "bytes"} of every shipped weight file."""
    folders = (root / "workers" / "weights", root / "vector_store" / "weights", root / "ops" / "scenes" / "data")
    paths = sorted(p for folder in folders for p in folder.rglob("*.safetensors"))
    return {
        str(p.relative_to(root)): {
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            "bytes": p.stat().st_size,
        }
        for p in paths
    }
