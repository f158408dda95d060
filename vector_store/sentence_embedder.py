"""Text-only embedders of sentence-transformers' form, from a folder on this machine: for looking at traces, not for serving.

The cache compares texts with images, which these models cannot embed; but published studies of prompts use them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modm_tasks.errors import InvalidInputError
from vector_store.embedder import Vector, unit_rows

BATCH = 64
DEFAULT_TOKENS = 256


class SentenceEmbedder:
    """Mean of the last layer's token vectors, scaled to length 1, as all-MiniLM-L6-v2 and its kin do it."""

    def __init__(self, folder: Path) -> None:
        """Raises InvalidInputError for a folder that holds no such model, or one that pools in another way."""
        pooling = _read(folder, "1_Pooling/config.json")
        if not pooling.get("pooling_mode_mean_tokens"):
            raise InvalidInputError(f"{folder}: only models that take the mean of tokens are read", field="embedder")
        self._max_tokens = int(_read(folder, "sentence_bert_config.json").get("max_seq_length", DEFAULT_TOKENS))
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        self._torch = torch
        logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise InvalidInputError(f"{folder}: {line}", field="embedder") from error
        self.dim = int(self._model.config.hidden_size)

    def embed_texts(self, texts: Sequence[str]) -> Vector:
        """float32 [n, dim], rows of unit length; longer texts are cut where the model's makers cut them."""
        # By length, so that a batch is not padded to its one long text.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        with self._torch.inference_mode():
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                out[part] = self._mean([texts[i] for i in part])
        return unit_rows(out)

    def _mean(self, texts: list[str]) -> Vector:
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        mean: Vector = ((states * mask).sum(1) / mask.sum(1)).numpy()
        return mean


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise InvalidInputError(f"{folder}: no text model of sentence-transformers' form ({name})", field="embedder")
    return found
