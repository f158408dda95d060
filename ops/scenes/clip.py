"""`scenes-clip`: an open_clip model whose cosine says how many attributes of a prompt a picture (or prompt) shares.

Beside the contrastive loss (with pictures and captions of one-attribute edits and swaps as hard negatives) a regression
holds cosines to the share of matching attributes. A cache needs that: its ladder reads *how far* a picture is from a
prompt off the cosine, and a purely contrastive model may put every non-match at the same distance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import nn
from torch.nn import functional as F

from ops.scenes.captions import caption, vocabulary
from ops.scenes.loop import StageConfig, StepRandom, bf16, run_stage
from ops.scenes.render import render_array
from ops.scenes.scene import CODE_COLUMNS, Scene, edit_scene, sample_scene, swap_colours, swap_positions
from ops.scenes.text import AttributeReader, attribute_loss

NAME = "scenes-clip"
#: Text width 96, not 128: open_clip's 49,408-row token table (nearly all of it zeros here) stays under 10 MB in fp16.
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 3},
}
STAGE = StageConfig(name="clip", steps=1300, learning_rate=1.5e-3, ema=0.99, decay=0.5, weight_decay=0.05)
PAIRS = 64
_MAX_SCALE = 40.0
#: Weight of each code column in the wanted cosine. What covers much of the picture is costly to change by refining a
#: cached picture, so a wrong background or layout must lower the cosine more than a wrong size.
_WEIGHTS = dict(zip(CODE_COLUMNS, (1.3, 1.2, 1.2, 1.0, 1.0, 0.7, 1.0, 1.0, 0.7), strict=True))
#: Share of matching weight between two unrelated scenes, which the wanted cosine puts at zero.
_CHANCE = 0.26


def used_token_ids() -> list[int]:
    """Sorted ids of open_clip's vocabulary that the grammar can produce (start and end marks are the last two)."""
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    ids = {49406, 49407}
    for word in vocabulary():
        ids.update(tokenizer.encode(word))
    return sorted(ids)


class CompactTokenizer:
    """Captions -> ids renumbered to 0..n-1 in order, so that training need not carry 49,408 token rows.

    Row 0 of the mapping is also padding (id 0 of the full table, never a grammar word): order is kept, so open_clip's
    pooling at the largest id still finds the end mark.
    """

    def __init__(self) -> None:
        self.ids = [0, *used_token_ids()]
        self._tokenizer = open_clip.SimpleTokenizer(context_length=32)
        self._map = torch.zeros(49408, dtype=torch.long)
        self._map[torch.tensor(self.ids)] = torch.arange(len(self.ids))

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """-> int64 (n, 32)."""
        return self._map[self._tokenizer(texts)]


def make_compact_clip(tokenizer: CompactTokenizer) -> open_clip.CLIP:
    text = {**CONFIG["text_cfg"], "vocab_size": len(tokenizer.ids)}
    return open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], text)


def full_state(compact: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights for the ordinary open_clip model: token rows back in their places, all unused rows zero."""
    ids = torch.tensor(CompactTokenizer().ids)
    table = torch.zeros(CONFIG["text_cfg"]["vocab_size"], CONFIG["text_cfg"]["width"])
    table[ids] = compact["token_embedding.weight"]
    return {**compact, "token_embedding.weight": table}


def clip_pixels(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) -> (n, 3, 64, 64), normalised as open_clip's default preprocessing does."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def wanted_cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Codes (n, 9), (m, 9) -> (n, m): 1 for the same scene, 0 for unrelated ones, linear in the weight that matches."""
    weights = torch.tensor(list(_WEIGHTS.values()))
    a, b = left[:, None, :], right[None, :, :]
    present = (a >= 0) | (b >= 0)
    match = ((a == b) & present).float()
    share = (match * weights).sum(-1) / (present.float() * weights).sum(-1)
    return ((share - _CHANCE) / (1 - _CHANCE)).clamp(min=-0.1)


def hard_negative(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs by swapped colours, swapped positions, or one or two attributes."""
    kind = rng.integers(5)
    swapped = swap_colours(scene) if kind == 0 else swap_positions(scene) if kind == 1 else scene
    if swapped != scene:
        return swapped
    edited = edit_scene(scene, rng)
    return edit_scene(edited, rng) if kind == 2 else edited


def train_clip(folder: Path, config: StageConfig = STAGE, *, stop_after: int | None = None) -> None:
    torch.manual_seed(config.seed)
    tokenizer = CompactTokenizer()
    clip = make_compact_clip(tokenizer)
    readers = {n: AttributeReader(CONFIG["embed_dim"], pooled=True) for n in ("read_image", "read_text")}

    def step(index: int, rng: StepRandom) -> tuple[torch.Tensor, dict[str, float]]:
        anchors = [sample_scene(rng.numpy) for _ in range(PAIRS)]
        scenes = anchors + [_allowed_negative(s, rng.numpy) for s in anchors]
        texts = scenes + [_allowed_negative(s, rng.numpy) for s in scenes]
        pixels = np.stack([render_array(s, int(rng.numpy.integers(2**31))) for s in scenes])
        codes = torch.tensor([s.codes() for s in texts])
        ids = tokenizer([caption(s, rng.numpy) for s in texts])
        with bf16():
            image = clip.encode_image(clip_pixels(pixels)).float()
            text = clip.encode_text(ids).float()
        image_unit, text_unit = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        scale = clip.logit_scale.exp().clamp(max=_MAX_SCALE)
        n = len(scenes)
        cosine = image_unit @ text_unit.T
        # A pair of equal scenes elsewhere in the batch is no negative.
        wanted = wanted_cosine(codes[:n], codes)
        same = (wanted > 0.999) & ~torch.eye(n, len(texts), dtype=torch.bool)
        logits = (scale * cosine).masked_fill(same, -1e4)
        labels = torch.arange(n)
        contrast = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :n].T, labels))
        between = wanted_cosine(codes, codes)
        graded = F.mse_loss(cosine, 0.97 * wanted) + 0.5 * F.mse_loss(text_unit @ text_unit.T, between)
        fade = max(0.0, 1 - index / (0.6 * config.steps))
        read_image, _ = attribute_loss(readers["read_image"](image), codes[:n])
        read_text, accuracy = attribute_loss(readers["read_text"](text), codes)
        loss = contrast + 20.0 * graded + 0.3 * fade * (read_image + read_text)
        hit = (logits.argmax(1) == labels).float().mean()
        return loss, {"contrast": contrast.item(), "graded": graded.item(), "hit": float(hit), "text": accuracy}

    run_stage(config, {"clip": clip, **readers}, step, folder, stop_after=stop_after)


def _allowed_negative(scene: Scene, rng: np.random.Generator) -> Scene:
    while True:
        other = hard_negative(scene, rng)
        if not other.held_out:
            return other


def load_clip(folder: Path) -> tuple[nn.Module, Any, Any]:
    """(model, preprocess, tokenizer) by plain open_clip from an exported folder."""
    open_clip.add_model_config(folder / f"{NAME}.json")
    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=str(folder / f"{NAME}.safetensors"))
    model.eval()
    return model, preprocess, open_clip.get_tokenizer(NAME)


def write_config(folder: Path) -> None:
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
