"""Where the simulator's similarities come from: stored vectors, or a statistical model.

Rows are numbered: the first ``warm`` are in the cache at time 0, the rest arrive in their order. Candidate lists are made
once, in blocks, so that no n x n matrix is ever held: at most ``KEEP`` rows for each, the most similar first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modm_tasks.errors import InvalidInputError, NotFoundError

Floats = NDArray[np.float32]
BLOCK = 1024
#: More near-duplicates than this of one prompt, all of them unusable at once, would hide a usable one behind them.
KEEP = 256
#: Texts this similar are the same text: float16 storage rounds a cosine of 1 by some 1e-3.
SAME_TEXT = 0.9985

Pairs = Sequence[tuple[int, float]]


class Similarities(Protocol):
    """``images(i)``: rows whose image is similar to text i. ``texts(i)``: rows whose text is. ``readers(j)``: rows whose
    text is similar to image j. Each as (row, cosine), the most similar first; none below the threshold asked for."""

    n: int
    warm: int
    #: A statistical source image stands for any image of the cache, so it is never evicted.
    always_cached: bool

    def images(self, i: int) -> Pairs: ...
    def texts(self, i: int) -> Pairs: ...
    def readers(self, j: int) -> Pairs: ...
    def same_text(self, i: int, j: int) -> bool: ...


class VectorSimilarities:
    """From vectors, float [n, dim], normalised here. Without image vectors the texts stand in for them."""

    always_cached = False

    def __init__(
        self, text: NDArray[np.floating], *, warm: int, threshold: float, image: NDArray[np.floating] | None = None
    ) -> None:
        vectors = _unit(text)
        self.n, self.warm = len(vectors), warm
        if not 0 <= warm < self.n:
            raise InvalidInputError(
                f"warm-cache must be 0..{self.n - 1} with {self.n} rows, not {warm}", field="warm_cache"
            )
        floor = threshold if image is None else min(threshold, 0.5)
        self._texts = _candidates(vectors, vectors, floor)
        pictures = None if image is None else _unit(image)
        if pictures is not None and len(pictures) != self.n:
            message = f"{self.n} text and {len(pictures)} image vectors; both must be one per row"
            raise InvalidInputError(message, field="embeddings")
        self._images = self._texts if pictures is None else _candidates(vectors, pictures, threshold)
        self._readers = self._texts if pictures is None else _candidates(pictures, vectors, threshold)

    def images(self, i: int) -> Pairs:
        return self._images[i]

    def texts(self, i: int) -> Pairs:
        return self._texts[i]

    def readers(self, j: int) -> Pairs:
        return self._readers[j]

    def same_text(self, i: int, j: int) -> bool:
        return any(row == j and s >= SAME_TEXT for row, s in self._texts[i])


class StatisticalSimilarities:
    """Each request is a hit with probability ``hit_rate``, on a rung drawn from ``shares``; nothing else is known.

    Chance is independent of load and of the cache's content, so it shows what a given hit rate does, not what hit rate a
    load leads to; in-flight reuse and late binding have nothing to find here.
    """

    always_cached = True

    def __init__(self, n: int, *, hit_rate: float, shares: Sequence[tuple[float, float]], seed: int) -> None:
        if not 0 <= hit_rate <= 1:
            raise InvalidInputError(f"hit-rate must be 0..1, not {hit_rate}", field="hit_rate")
        weights = np.array([w for _, w in shares], dtype=np.float64)
        if len(weights) == 0 or weights.sum() <= 0:
            raise InvalidInputError("P(k) needs at least one positive weight", field="k_share")
        rng = np.random.default_rng(seed)
        levels = np.array([s for s, _ in shares], dtype=np.float64)
        drawn = levels[rng.choice(len(levels), size=n, p=weights / weights.sum())]
        self._similarity = np.where(rng.random(n) < hit_rate, drawn, -1.0)
        self.n, self.warm = n + 1, 1

    def images(self, i: int) -> Pairs:
        similarity = float(self._similarity[i - 1])
        return ((0, similarity),) if similarity >= 0 else ()

    def texts(self, i: int) -> Pairs:
        return ()

    def readers(self, j: int) -> Pairs:
        return ()

    def same_text(self, i: int, j: int) -> bool:
        return False


def _unit(vectors: NDArray[np.floating]) -> Floats:
    if vectors.ndim != 2 or len(vectors) < 2:
        raise InvalidInputError(
            f"embeddings must be [n, dim] with n >= 2, not {list(vectors.shape)}", field="embeddings"
        )
    out = vectors.astype(np.float32)
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise InvalidInputError("embeddings hold a row that is zero or not finite", field="embeddings")
    return np.asarray(out / norms, dtype=np.float32)


def _candidates(rows: Floats, columns: Floats, threshold: float) -> list[tuple[tuple[int, float], ...]]:
    out: list[tuple[tuple[int, float], ...]] = []
    keep = min(KEEP, len(columns) - 1)
    for start in range(0, len(rows), BLOCK):
        scores = rows[start : start + BLOCK] @ columns.T
        for offset, row in enumerate(scores):
            row[start + offset] = -1.0
            above = np.flatnonzero(row >= threshold)
            if len(above) > keep:
                above = above[np.argpartition(-row[above], keep)[:keep]]
            # Equal similarities (exact repeats): the newest row first, as a cache that fills in order would answer.
            order = above[np.lexsort((-above, -row[above]))]
            out.append(tuple((int(j), min(1.0, float(row[j]))) for j in order))
    return out


def load_embeddings(path: Path) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
    """``.npy`` [n, dim] of text vectors, or ``.npz`` with ``text`` and ``image``, row for row. Raises ModmError."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            return loaded["text"], loaded["image"]
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file: {path}") from error
    except KeyError as error:
        raise InvalidInputError(f"{path}: an .npz must hold the arrays text and image", field="embeddings") from error
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: not a NumPy file of vectors", field="embeddings") from error
