"""Fits what a ladder file holds: rungs, the map from texts to images, and the floor of each rung. Pure functions.

Quality is any number per image, higher is better: CLIP score as in the paper (section 5.2, equation 5), or a judge's
accuracy. What is measured comes in as arrays, one entry a pair of prompt and source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

#: Width of the sliding band of similarity over which quality is averaged, and how many pairs make a mean worth having.
BAND, LEAST_IN_BAND = 0.06, 25
#: How finely thresholds are tried, and how far apart rungs lie at least.
STEP = 0.01
#: Fewest images below a floor: a floor set by one or two unlucky ones says nothing about the next.
LEAST_FLAGGED = 6
#: A floor is worth a large image only where what lies below it is mostly failures.
LEAST_PRECISION = 0.5


@dataclass(frozen=True)
class FittedRung:
    """From ``min_similarity`` (text-to-image cosine) on, ``skipped_steps`` may be skipped. ``quality`` is over ``pairs``."""

    min_similarity: float
    skipped_steps: int
    quality: float
    pairs: int


@dataclass(frozen=True, kw_only=True)
class FloorFigures:
    """What a floor does to a set of refined images: share of the flagged that failed, share of the failed it flags."""

    precision: float | None
    recall: float | None
    flagged: int
    failures: int
    pairs: int

    def to_json(self) -> dict[str, Any]:
        rounded = {k: None if (v := getattr(self, k)) is None else round(v, 4) for k in ("precision", "recall")}
        return rounded | {k: getattr(self, k) for k in ("flagged", "failures", "pairs")}


def lowest_similarity(
    similarity: Floats,
    quality: Floats,
    target: float,
    *,
    band: float = BAND,
    step: float = STEP,
    least: int = LEAST_IN_BAND,
) -> tuple[float, float, int] | None:
    """(threshold, quality in the band above it, pairs in that band), or None where not even the best sources do.

    Walks down from the most similar pairs in ``step`` and stops at the first band whose mean quality is below ``target``.
    """
    best = None
    for low in np.arange(round(float(similarity.max()) / step) * step, float(similarity.min()) - 1e-9, -step):
        inside = (similarity >= low) & (similarity < low + band)
        if inside.sum() < least:
            continue
        mean = float(quality[inside].mean())
        if mean < target:
            break
        best = (round(float(low), 4), mean, int(inside.sum()))
    return best


def build_ladder(
    measured: Mapping[int, tuple[Floats, Floats]],
    target: float,
    *,
    band: float = BAND,
    step: float = STEP,
    least: int = LEAST_IN_BAND,
) -> list[FittedRung]:
    """``measured``: by k, similarity and quality of pairs. Rungs in descending similarity; a k that never reaches the
    target gets none."""
    rungs: list[FittedRung] = []
    floor = -1.0
    for depth in sorted(measured):
        found = lowest_similarity(*measured[depth], target, band=band, step=step, least=least)
        if found is None:
            continue
        # More skipped steps never ask for less similarity: a noisy estimate must not turn the ladder upside down.
        floor = round(max(0.0, found[0], floor + step), 4)
        rungs.append(FittedRung(floor, depth, round(found[1], 4), found[2]))
    return rungs[::-1]


def fit_prediction(text_to_text: Floats, text_to_image: Floats) -> dict[str, float]:
    """Line from the cosine of two prompts to that of the one with the other's picture: what a request may expect of a
    source that is not drawn yet. ``error`` is the root mean square of what the line misses.
    """
    x, y = text_to_text.ravel(), text_to_image.ravel()
    slope, intercept = (0.0, float(y.mean())) if np.ptp(x) < 1e-6 else np.polyfit(x, y, 1)
    error = prediction_error((float(slope), float(intercept)), x, y)
    return {"slope": round(float(slope), 4), "intercept": round(float(intercept), 4), "error": round(error, 4)}


def prediction_error(line: tuple[float, float], text_to_text: Floats, text_to_image: Floats) -> float:
    """Root mean square of what (slope, intercept) misses."""
    return float(np.sqrt(np.mean((line[0] * text_to_text + line[1] - text_to_image) ** 2)))


def on_rung(similarity: Floats, rungs: Sequence[FittedRung], index: int, *, band: float = BAND) -> Bools:
    """Which pairs a rung is judged by: from its similarity up to the next rung's, but at least a band wide, as the
    deepest rungs lie so close together that hardly a pair falls between them. ``rungs`` in descending similarity."""
    low = rungs[index].min_similarity
    upper = rungs[index - 1].min_similarity if index else float("inf")
    inside: Bools = (similarity >= low) & (similarity < max(upper, low + band))
    return inside


def fit_floor(
    scores: Floats, failed: Bools, *, precision: float = LEAST_PRECISION, least: int = LEAST_FLAGGED
) -> float | None:
    """The highest score below which at least ``precision`` of the images failed; None where there is none.

    The highest one finds most of the failures that can be found at that precision. It must be kept with a standard error to
    spare: of many scores tried on few images, some look good by chance.
    """
    order = np.argsort(scores, kind="stable")
    ordered, wrong = scores[order], np.cumsum(failed[order])
    counts = np.arange(1, len(ordered) + 1)
    spare = np.sqrt(precision * (1 - precision) * counts)
    good = np.flatnonzero((wrong >= precision * counts + spare) & (counts >= least))
    if not len(good):
        return None
    last = int(good[-1])
    upper = ordered[last + 1] if last + 1 < len(ordered) else ordered[last] + 1e-3
    return round(float((ordered[last] + upper) / 2), 4)


def judge_floor(scores: Floats, failed: Bools, floor: float | None) -> FloorFigures:
    """Precision and recall of a floor on images that it was not fitted on."""
    flagged = np.zeros(len(scores), dtype=bool) if floor is None else scores < floor
    hit, failures = int((flagged & failed).sum()), int(failed.sum())
    return FloorFigures(
        precision=hit / int(flagged.sum()) if flagged.any() else None,
        recall=hit / failures if failures else None,
        flagged=int(flagged.sum()),
        failures=failures,
        pairs=len(scores),
    )


def rungs_json(rungs: Sequence[FittedRung], floors: Mapping[int, float | None]) -> list[dict[str, Any]]:
    """The ``rungs`` of a ladder file; ``floors`` by k, None = no floor."""
    return [
        {"min_similarity": r.min_similarity, "skipped_steps": r.skipped_steps}
        | ({} if (floor := floors.get(r.skipped_steps)) is None else {"verify_floor": floor})
        for r in rungs
    ]
