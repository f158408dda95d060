"""Floors of all rungs from scored, judged images; and what they do to images that they were not fitted on. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.decisions.fitting import Bools, Floats, fit_floor, judge_floor

_FITTED = ("scores", "failed")


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Refined images of one rung. ``failed`` by the judge; ``large_failed``: the large model's own image of the prompt.

    ``held_out``: not to be fitted on.
    """

    scores: Floats
    failed: Bools
    large_failed: Bools
    held_out: Bools


def fit_floors(refined: Mapping[int, Refined]) -> tuple[dict[int, float | None], dict[str, Any]]:
    """Floors by k from the one half, figures from the other: precision and recall of each rung, and the share of hits that
    are right as refined, among those kept, and after the flagged ones are drawn again by the large model.

    A rung with too few failures for a floor of its own gets the one of all rungs together.
    """
    floors: dict[int, float | None] = {}
    together = fit_floor(*(np.concatenate([getattr(r, n)[~r.held_out] for r in refined.values()]) for n in _FITTED))
    rungs, parts = [], []
    for k, r in sorted(refined.items(), reverse=True):
        fit, test = ~r.held_out, r.held_out
        own = fit_floor(r.scores[fit], r.failed[fit])
        floor = floors[k] = together if own is None else own
        rungs.append(
            {"skipped_steps": k, "floor": floor, "own": own is not None}
            | judge_floor(r.scores[test], r.failed[test], floor).to_json()
        )
        flagged = np.zeros(int(test.sum()), dtype=bool) if floor is None else r.scores[test] < floor
        parts.append((flagged, r.failed[test], r.large_failed[test]))
    flagged, failed, large_failed = (np.concatenate(column) for column in zip(*parts, strict=True))
    n, caught = len(flagged), int((flagged & failed).sum())
    return floors, {
        "hits": n,
        "right_before": round(1 - float(failed.mean()), 4),
        "right_of_kept": round(1 - float(failed[~flagged].mean()), 4) if (~flagged).any() else None,
        "right_after": round(1 - float(np.where(flagged, large_failed, failed).mean()), 4),
        "drawn_again": round(float(flagged.mean()), 4),
        "precision": round(caught / int(flagged.sum()), 4) if flagged.any() else None,
        "recall": round(caught / int(failed.sum()), 4) if failed.any() else None,
        "rungs": rungs,
    }
