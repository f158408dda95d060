"""Judges images of the `scenes` family as a set: attribute accuracy, and Fréchet distance to rendered references.

Accuracy is read off by a classifier that shares nothing with the models that serve. The Fréchet distance is taken
between image vectors of `scenes-clip` (128 numbers, unit length) and those of renderings of the same prompts, times
1,000; like every such distance it grows as the sets shrink, so sets of one size are compared and the distance between
two sets of renderings stands beside it as the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ops.scenes.captions import parse_caption
from ops.scenes.classifier import attribute_accuracy
from ops.scenes.embed import embed_images
from ops.scenes.render import render

Floats = NDArray[np.floating]
#: Renderings of each prompt that make the reference; further ones make the floor.
REFERENCES = 4


def read_image(path: Path) -> Image.Image:
    """An image file as RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def accuracy(images: Sequence[Image.Image], prompts: Sequence[str]) -> Floats:
    """Share of right attributes of each image, 0..1. Raises ValueError for a prompt outside the grammar."""
    mean: Floats = attribute_accuracy(images, [parse_caption(p) for p in prompts])["mean"]
    return mean


def vectors(images: Sequence[Image.Image]) -> Floats:
    """[n, 128], unit length."""
    found: Floats = embed_images(images)
    return found


def reference(prompts: Sequence[str], *, first_seed: int = 0, times: int = REFERENCES) -> Floats:
    """Vectors of ``times`` renderings of each prompt."""
    scenes = [parse_caption(p) for p in prompts]
    return vectors([render(s, first_seed + i + n * len(scenes)) for n in range(times) for i, s in enumerate(scenes)])


def frechet(one: Floats, other: Floats) -> float:
    """Squared Fréchet distance of the two Gaussians that have the sets' means and covariances, times 1,000."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, basis = np.linalg.eigh(cov_a)
    root = (basis * np.sqrt(np.clip(values, 0, None))) @ basis.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(1000 * max(0.0, gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def pairwise_similarity(found: Floats) -> float:
    """Mean cosine over all pairs of a set's vectors: 1 = all the same image. NaN for fewer than two."""
    n = len(found)
    total = float(found.sum(0) @ found.sum(0)) - float((found * found).sum())
    return total / (n * (n - 1)) if n > 1 else float("nan")
