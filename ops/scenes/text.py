"""The family's tokenizer and tiny CLIP text encoders, pretrained to know what a caption says.

Learning language through a denoising loss is slow. A minute of predicting a scene's attributes from its caption,
through the very hidden states that the pipelines will hand to the denoisers, leaves them only drawing to learn.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ops.scenes.captions import caption, vocabulary
from ops.scenes.loop import StageConfig, StepRandom, run_stage
from ops.scenes.scene import CODE_SIZES, sample_scene

#: Tokens per caption, start and end marks included (the longest caption has 22 words and a comma is a word).
CONTEXT = 24
WIDTH = 64
STAGE = StageConfig(name="text", steps=1200, learning_rate=2e-3, ema=0.99, decay=0.5)
BATCH = 96


def write_tokenizer(folder: Path) -> None:
    """A CLIP byte-pair tokenizer of the family's own: every byte, and merges that make each grammar word one token.

    Any text can be tokenized (unknown words fall apart into letters), and a token table stays at some 800 rows.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: dict[tuple[str, str], int] = {}
    for word in vocabulary():
        pieces = _byte_pairs(word, merges)
        while len(pieces) > 1:
            # A later merge ranks lower, so it cannot break a word that earlier merges already make whole.
            merges[(pieces[0], pieces[1])] = len(merges)
            pieces = _byte_pairs(word, merges)
    tokens = list(dict.fromkeys([*tokens, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_ids = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocabulary_ids, list(merges), model_max_length=CONTEXT).save_pretrained(str(folder))


def _byte_pairs(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the merge of lowest rank is applied until none applies."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        ranked = [(merges[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in merges]
        if not ranked:
            return pieces
        i = min(ranked)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(folder))


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """-> int64 (n, CONTEXT), padded as the pipelines pad."""
    out = tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    ids: torch.Tensor = out.input_ids
    return ids


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> dict[str, nn.Module]:
    """The two encoders that an SD3 pipeline reads at their last but one layer; their pooled vectors are projected."""
    config = text_config(tokenizer)
    return {
        "clip_l": CLIPTextModelWithProjection(config),
        "clip_g": CLIPTextModelWithProjection(config),
    }


class AttributeReader(nn.Module):
    """Reads the attributes out of hidden states (one attention query per attribute) or out of a pooled vector."""

    def __init__(self, width: int, *, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.query = nn.Parameter(torch.randn(len(CODE_SIZES), width) * width**-0.5)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in CODE_SIZES)

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        """(n, width) or (n, tokens, width) -> logits (n, values) per column of the codes."""
        if self.pooled:
            return [head(states) for head in self.heads]
        weights = torch.softmax(torch.einsum("qw,ntw->nqt", self.query, states), dim=-1)
        read = torch.einsum("nqt,ntw->nqw", weights, states)
        return [head(read[:, i]) for i, head in enumerate(self.heads)]


def attribute_loss(logits: list[torch.Tensor], codes: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross-entropy summed over the columns; codes of -1 (no second object) do not count. Also the mean accuracy."""
    losses = [F.cross_entropy(x.float(), codes[:, i], ignore_index=-1) for i, x in enumerate(logits)]
    known = codes >= 0
    right = torch.stack([x.argmax(-1) for x in logits], 1) == codes
    return torch.stack(losses).sum(), float(right[known].float().mean())


def train_text(folder: Path, config: StageConfig = STAGE, *, stop_after: int | None = None) -> None:
    torch.manual_seed(config.seed)
    write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    encoders = make_text_encoders(tokenizer)
    readers = {
        "read_l": AttributeReader(WIDTH, pooled=False),
        "read_g": AttributeReader(WIDTH, pooled=False),
        "read_pooled": AttributeReader(2 * WIDTH, pooled=True),
    }

    def step(index: int, rng: StepRandom) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = [sample_scene(rng.numpy) for _ in range(BATCH)]
        ids = tokenize(tokenizer, [caption(s, rng.numpy) for s in scenes])
        codes = torch.tensor([s.codes() for s in scenes])
        left = encoders["clip_l"](ids, output_hidden_states=True)
        right = encoders["clip_g"](ids, output_hidden_states=True)
        pooled = torch.cat([left.text_embeds, right.text_embeds], -1)
        parts = [
            attribute_loss(readers["read_l"](left.hidden_states[-2]), codes),
            attribute_loss(readers["read_g"](right.hidden_states[-2]), codes),
            attribute_loss(readers["read_pooled"](pooled), codes),
        ]
        names = ("l", "g", "pooled")
        # The size of hidden states is held near one: the denoisers' first layers then start at a sane scale.
        size = sum((x.pow(2).mean() - 1).abs() for x in (left.hidden_states[-2], right.hidden_states[-2], pooled))
        loss = torch.stack([p[0] for p in parts]).sum() + 0.1 * size
        return loss, {name: p[1] for name, p in zip(names, parts, strict=True)}

    run_stage(config, {**encoders, **readers}, step, folder, stop_after=stop_after)
