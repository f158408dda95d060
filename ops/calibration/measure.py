"""What a calibration measures: pairs of a prompt and a cached image at all distances, refined at every depth and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ops.calibration.draw import Drawer
from orchestrator.decisions.fitting import Floats
from vector_store.embedder import Embedder, Vector

#: Quality of images for their prompts, one number each, higher is better.
Metric = Callable[[Sequence[str], Sequence[Image.Image]], Sequence[float]]
Say = Callable[[str], None]
#: Images in memory at a time: embedders batch, and a thousand images of a megapixel are three gigabytes.
CHUNK = 32
#: Other seeds than the sources', so that a refined image of one's own prompt is no copy by construction.
REFINE_SEED = 7


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Prompt ``prompt`` refined from the large image of prompt ``source``, ``skipped_steps`` skipped."""

    prompt: int
    source: int
    skipped_steps: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An entry a pair, but ``large``: one a prompt. ``scores``: the refined image's CLIP score; ``quality``: the metric."""

    pairs: list[Pair]
    similarity: Floats
    text_similarity: Floats
    scores: Floats
    quality: Floats
    large: Floats


def plan_pairs(similarity: Floats, depths: Sequence[int], per_depth: int) -> list[Pair]:
    """``similarity`` [prompts, images]. Sources by rank 0, 1, 2, 4, 8, ... of their similarity, in turn over prompts and
    depths, so that each depth sees every distance about equally often."""
    n = len(similarity)
    ranks = [0, *(2**i for i in range(n.bit_length()) if 2**i < n)]
    order = np.argsort(-similarity, axis=1, kind="stable")
    return [
        Pair(prompt=i, source=int(order[i, ranks[(i + r + step * (len(ranks) // per_depth or 1)) % len(ranks)]]),
             skipped_steps=depth)
        for r, depth in enumerate(depths)
        for i in range(n)
        for step in range(per_depth)
    ]  # fmt: skip


class Measurement:
    """Draws, embeds and scores. ``metric`` None = CLIP score by the embedder, as in the paper."""

    def __init__(self, drawer: Drawer, embedder: Embedder, metric: Metric | None, say: Say) -> None:
        self.drawer, self.embedder, self.metric, self.say = drawer, embedder, metric, say

    def run(self, prompts: Sequence[str], *, depths: Sequence[int], per_depth: int, seed: int) -> Measured:
        """Everything, for prompts that are all different. Takes prompts x (large + depths x per_depth x small) images."""
        seeds = [seed + i for i in range(len(prompts))]
        large = []
        for i, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
            large.append(self.drawer.generate(prompt, own))
            self._tell("large", i + 1, len(prompts))
        texts = np.concatenate([self.embedder.embed_texts(list(part)) for part in _chunks(prompts)])
        images, _, large_quality = self._judge(prompts, texts, large)
        similarity = np.clip(texts @ images.T, 0.0, None)
        pairs = plan_pairs(similarity, depths, per_depth)
        refined = []
        for n, pair in enumerate(pairs):
            refined.append(
                self.drawer.refine(
                    prompts[pair.prompt], seeds[pair.prompt] + REFINE_SEED, large[pair.source], pair.skipped_steps
                )
            )
            self._tell("refined", n + 1, len(pairs))
        rows, sources = [p.prompt for p in pairs], [p.source for p in pairs]
        _, scores, quality = self._judge([prompts[i] for i in rows], texts[rows], refined)
        return Measured(
            pairs=pairs, similarity=similarity[rows, sources], scores=scores, quality=quality, large=large_quality,
            text_similarity=np.clip((texts[rows] * texts[sources]).sum(1), 0.0, None),
        )  # fmt: skip

    def _judge(self, prompts: Sequence[str], texts: Vector, files: Sequence[Path]) -> tuple[Vector, Floats, Floats]:
        """(image vectors, CLIP scores, quality) of image files for their prompts."""
        vectors, quality = [], []
        for start in range(0, len(files), CHUNK):
            images = [self.drawer.read(f) for f in files[start : start + CHUNK]]
            vectors.append(self.embedder.embed_images(images))
            if self.metric is not None:
                quality += [float(q) for q in self.metric(prompts[start : start + CHUNK], images)]
        found = np.concatenate(vectors)
        scores: Floats = (found * texts).sum(1)
        return found, scores, scores if self.metric is None else np.array(quality)

    def _tell(self, what: str, done: int, total: int) -> None:
        if done == total or done % 100 == 0:
            self.say(f"{what}: {done} of {total}")


def _chunks(items: Sequence[str]) -> list[Sequence[str]]:
    return [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
