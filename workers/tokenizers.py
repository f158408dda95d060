"""Small tokenizers made on the spot, for pipelines with random weights. Nothing is downloaded."""

from __future__ import annotations

import string
from typing import Any

_CHARACTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]


def _byte_level_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip_tokenizer(max_length: int = 77) -> Any:
    """Characters as CLIP tokens; begin, end and padding tokens as in the original."""
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *_CHARACTERS, *(f"{c}</w>" for c in _CHARACTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def t5_tokenizer(max_length: int = 512) -> Any:
    """Characters as unigrams."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0), *((c, -3.0) for c in _CHARACTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)


def gemma_tokenizer(max_length: int = 4096) -> Any:
    """Characters, with Gemma's special tokens."""
    from transformers import GemmaTokenizerFast

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *_CHARACTERS, *string.ascii_uppercase]
    return GemmaTokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length
    )


def qwen_tokenizer(max_length: int = 512) -> Any:
    """Bytes, with Qwen's chat tokens and a minimal chat template."""
    from transformers import Qwen2TokenizerFast

    tokens = ["<|endoftext|>", *_byte_level_alphabet()]
    made = Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    return made
