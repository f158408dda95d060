"""From what was measured to the content of a ladder file. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from modm_tasks.errors import InvalidInputError
from ops.calibration.floors import Refined, fit_floors
from ops.calibration.measure import Measured
from orchestrator.decisions.fitting import (
    LEAST_IN_BAND,
    FittedRung,
    Floats,
    build_ladder,
    fit_prediction,
    on_rung,
    prediction_error,
    rungs_json,
)

#: Width of the sliding band as a share of the spread of similarity: cosines of ViT-L/14 lie within .2, others within .9.
BAND_SHARE = 0.07


def relative_quality(m: Measured) -> Floats:
    """1 = as good as the large model's own image of the same prompt. Means of it are ratios of means (equation 5), and its
    noise is not blown up by prompts that the large model draws badly."""
    own = m.large[[p.prompt for p in m.pairs]]
    mean = float(m.large.mean())
    if mean <= 0:
        raise InvalidInputError(f"the mean quality of the large model must be above 0, not {mean:.3g}", field="metric")
    ratio: Floats = 1 + (m.quality - own) / mean
    return ratio


def fit(m: Measured, *, alpha: float, least: int = LEAST_IN_BAND) -> dict[str, Any]:
    """``rungs``, ``prediction`` and ``hold_out`` of a ladder file. Prompts of even number fit, the others are held out.

    Raises InvalidInputError where no depth reaches ``alpha`` of the large model's quality.
    """
    if m.large[[p.prompt for p in m.pairs]].shape != m.quality.shape:
        raise InvalidInputError("as many qualities as pairs are needed", field="metric")
    quality, depths = relative_quality(m), np.array([p.skipped_steps for p in m.pairs])
    held_out = np.array([p.prompt % 2 == 1 for p in m.pairs])
    low, high = np.percentile(m.similarity, [1, 99])
    band = max(1e-3, BAND_SHARE * float(high - low))
    measured = {
        int(k): (m.similarity[rows], quality[rows])
        for k in np.unique(depths)
        if (rows := (depths == k) & ~held_out).any()
    }
    rungs = build_ladder(measured, alpha, band=band, step=max(1e-4, band / 6), least=least)
    if not rungs:
        raise InvalidInputError(
            f"no depth keeps {alpha:g} of the large model's quality over {least} pairs of like similarity:"
            " the small model is too weak, or there are too few prompts",
            field="alpha",
        )
    refined, judged = {}, []
    for index, rung in enumerate(rungs):
        rows = (depths == rung.skipped_steps) & on_rung(m.similarity, rungs, index, band=band)
        refined[rung.skipped_steps] = Refined(
            scores=m.scores[rows], failed=quality[rows] < alpha, large_failed=np.zeros(int(rows.sum()), dtype=bool),
            held_out=held_out[rows],
        )  # fmt: skip
        judged.append(_judged(rung, quality[rows & held_out]))
    floors, verification = fit_floors(refined)
    prediction = fit_prediction(m.text_similarity[~held_out], m.similarity[~held_out])
    line = (prediction["slope"], prediction["intercept"])
    missed = prediction_error(line, m.text_similarity[held_out], m.similarity[held_out])
    return {
        "rungs": rungs_json(rungs, floors),
        "prediction": prediction,
        "hold_out": {
            "prompts": len(m.large) // 2,
            "large_quality": round(float(m.large[1::2].mean()), 4),
            "prediction_error": round(missed, 4),
            "rungs": judged,
            "verification": verification,
        },
    }


def _judged(rung: FittedRung, quality: Floats) -> dict[str, Any]:
    """``of_large``: mean over held-out pairs, with its standard error; None without any."""
    n = len(quality)
    return {
        "skipped_steps": rung.skipped_steps,
        "fitted": rung.quality,
        "of_large": round(float(quality.mean()), 4) if n else None,
        "error": round(float(quality.std(ddof=1) / np.sqrt(n)), 4) if n > 1 else None,
        "pairs": n,
    }
