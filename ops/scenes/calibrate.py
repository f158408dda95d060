"""Measures the ladder: how similar a cached picture must be for how many steps to be skipped.

For every depth k, held-out prompts are refined by `scenes-small` from pictures of `scenes-large` at all distances. The
rung's similarity is the lowest one above which refined quality, in a sliding band of similarity, stays at
`alpha` of the large model's own quality. Run: `python -m ops.scenes.calibrate`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ops.scenes.classifier import attribute_accuracy
from ops.scenes.clip import NAME as CLIP_NAME
from ops.scenes.embed import embed_images, embed_texts
from ops.scenes.export import CLIP_FOLDER, LARGE, SMALL, STEPS
from ops.scenes.generate import Job, draw_all
from ops.scenes.holdout import CHAIN_LENGTH, Prompt, calibration_prompts
from ops.scenes.loop import work_folder
from orchestrator.decisions.fitting import BAND, build_ladder, fit_prediction, lowest_similarity
from orchestrator.decisions.fitting import FittedRung as Rung

__all__ = ["BAND", "Rung", "build_ladder", "fit_prediction", "lowest_similarity"]

DEPTHS = (5, 10, 15, 20, 25, 30)
ALPHA = 0.97
#: Calibrated against a little more than the bar, as the evaluation is on other prompts.
MARGIN = 0.005
LADDER = CLIP_FOLDER / "ladder.json"


def rung_depth(rungs: Sequence[Rung], similarity: float) -> int:
    """Skipped steps for a similarity; 0 is a miss."""
    return next((r.skipped_steps for r in rungs if similarity >= r.min_similarity), 0)


def read_ladder(path: Path = LADDER) -> list[Rung]:
    ladder = json.loads(path.read_text())
    figures = {row["skipped_steps"]: row for row in ladder["hold_out"]["rungs"]}
    return [
        Rung(r["min_similarity"], k := r["skipped_steps"], figures[k]["quality"], figures[k]["pairs"])
        for r in ladder["rungs"]
    ]


def chain_similarity(prompts: Sequence[Prompt], texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """-> (n, CHAIN_LENGTH): cosine of each prompt to each picture of its own chain."""
    blocks = images.reshape(-1, CHAIN_LENGTH, images.shape[1])
    cosines: np.ndarray = np.einsum("nd,ncd->nc", texts, blocks[[p.chain for p in prompts]])
    return cosines


def measure(work: Path, processes: int) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], float, dict[str, float]]:
    """Per depth: similarities and qualities of pairs; the large model's own quality on the same prompts; and the line
    that predicts similarity from texts alone."""
    prompts = calibration_prompts()
    folder = work / "pictures"
    jobs = [Job(LARGE, p.text, p.seed) for p in prompts]
    images = draw_all(jobs, folder, processes=processes, label="calibrate large")
    scenes = [p.scene for p in prompts]
    large = float(attribute_accuracy(images, scenes)["mean"].mean())
    texts = embed_texts([p.text for p in prompts])
    similarity = chain_similarity(prompts, texts, embed_images(images))
    prediction = fit_prediction(chain_similarity(prompts, texts, texts), similarity)
    # Two of the five possible sources a prompt and depth, rotated so that every distance comes up equally often.
    plan: list[tuple[int, int, int]] = []
    for r, depth in enumerate(DEPTHS):
        for i, p in enumerate(prompts):
            plan += [(depth, i, (i + r + p.chain + step) % CHAIN_LENGTH) for step in (0, 2)]
    refine = [
        Job(SMALL, prompts[i].text, prompts[i].seed + 7, _source(jobs, prompts[i], c, folder), depth)
        for depth, i, c in plan
    ]
    refined = draw_all(refine, folder, processes=processes, label="calibrate refine")
    quality = attribute_accuracy(refined, [scenes[i] for _, i, _ in plan])["mean"]
    measured = {}
    for depth in DEPTHS:
        rows = [n for n, (d, _, _) in enumerate(plan) if d == depth]
        measured[depth] = (np.array([similarity[plan[n][1], plan[n][2]] for n in rows]), quality[rows])
    return measured, large, prediction


def _source(jobs: Sequence[Job], prompt: Prompt, member: int, folder: Path) -> str:
    return str(jobs[prompt.chain * CHAIN_LENGTH + member].path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=work_folder())
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    measured, large, prediction = measure(arguments.work, arguments.processes)
    target = (ALPHA + MARGIN) * large
    rungs = build_ladder(measured, target)
    profile = {
        str(depth): [
            {"from": round(float(low), 2), "pairs": int(inside.sum()), "quality": round(float(q[inside].mean()), 4)}
            for low in np.arange(0.0, 0.85, 0.05)
            if (inside := (s >= low) & (s < low + 0.05)).sum() >= 10
        ]
        for depth, (s, q) in measured.items()
    }
    ladder = {
        "schema_version": 1,
        "embedder": CLIP_NAME,
        "refiner": SMALL,
        "large": LARGE,
        "num_inference_steps": STEPS,
        "alpha": ALPHA,
        "rungs": [{"min_similarity": r.min_similarity, "skipped_steps": r.skipped_steps} for r in rungs],
        "prediction": prediction,
        "hold_out": {
            "prompts": len(calibration_prompts()),
            "large_quality": round(large, 4),
            "rungs": [{"skipped_steps": r.skipped_steps, "quality": r.quality, "pairs": r.pairs} for r in rungs],
            "by_depth": profile,
        },
    }
    LADDER.write_text(json.dumps(ladder, indent=2) + "\n")
    print(json.dumps(ladder["rungs"], indent=2))


if __name__ == "__main__":
    main()
