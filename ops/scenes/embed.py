"""Unit vectors of prompts and pictures by the shipped `scenes-clip`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ops.scenes.clip import load_clip
from ops.scenes.export import CLIP_FOLDER


@lru_cache(maxsize=1)
def _clip() -> tuple[Any, Any, Any]:
    return load_clip(CLIP_FOLDER)


def embed_texts(texts: Sequence[str]) -> np.ndarray:
    """-> float32 (n, 128), unit length."""
    model, _, tokenizer = _clip()
    parts = []
    for start in range(0, len(texts), 128):
        with torch.no_grad():
            parts.append(F.normalize(model.encode_text(tokenizer(list(texts[start : start + 128]))), dim=-1))
    vectors: np.ndarray = torch.cat(parts).numpy()
    return vectors


def embed_images(images: Sequence[Image.Image]) -> np.ndarray:
    """-> float32 (n, 128), unit length."""
    model, preprocess, _ = _clip()
    parts = []
    for start in range(0, len(images), 128):
        pixels = torch.stack([preprocess(image) for image in images[start : start + 128]])
        with torch.no_grad():
            parts.append(F.normalize(model.encode_image(pixels), dim=-1))
    vectors: np.ndarray = torch.cat(parts).numpy()
    return vectors
