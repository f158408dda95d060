"""Measures the bundled models against their bars and writes the model card and the contact sheets.

Run: `python -m ops.scenes.evaluate` (`make eval-scenes`). Pictures are kept in the work folder, so that a run that was
interrupted goes on where it stopped; new weights draw new ones. Exit code 4 when a bar is missed (with `--gate`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ops.scenes.calibrate import BAND, Rung, chain_similarity, read_ladder
from ops.scenes.captions import caption
from ops.scenes.card import write_card
from ops.scenes.classifier import attribute_accuracy
from ops.scenes.embed import embed_images, embed_texts
from ops.scenes.export import CLIP_FOLDER, LARGE, SMALL, weight_files
from ops.scenes.generate import Job, Painter, draw_all
from ops.scenes.holdout import CHAIN_LENGTH, Prompt, read_eval_prompts
from ops.scenes.loop import work_folder
from ops.scenes.render import render
from ops.scenes.scene import ATTRIBUTES, Scene, sample_scenes, swap_colours, swap_positions
from ops.scenes.sheets import refined_sheet, three_rows_sheet

ALPHA = 0.97
#: Pairs judged per rung.
PAIRS_PER_RUNG = 500
Figures = dict[str, Any]


def mean_se(values: np.ndarray, groups: np.ndarray) -> Figures:
    """Mean and its standard error; prompts of one chain are alike, so the error is taken over chains."""
    sums = np.array([(values[groups == g].sum(), (groups == g).sum()) for g in np.unique(groups)])
    mean = float(values.mean())
    n = len(sums)
    residual = sums[:, 0] - mean * sums[:, 1]
    se = float(np.sqrt((residual**2).sum() * n / max(1, n - 1)) / sums[:, 1].sum())
    return {"mean": round(mean, 4), "se": round(se, 4), "n": len(values)}


def ratio_se(top: np.ndarray, bottom: np.ndarray, groups: np.ndarray) -> Figures:
    """Mean(top) / mean(bottom) over paired values, with the delta-method standard error over chains."""
    ratio = float(top.mean() / bottom.mean())
    spread = mean_se(top - ratio * bottom, groups)
    return {"ratio": round(ratio, 4), "se": round(spread["se"] / float(bottom.mean()), 4), "n": len(top)}


def evaluate_drawing(
    prompts: Sequence[Prompt], work: Path, processes: int
) -> tuple[Figures, dict[str, list[Image.Image]], dict[str, np.ndarray]]:
    """Both models from noise: per-attribute accuracy on the unseen prompts, and on the held-out combinations."""
    scenes = [p.scene for p in prompts]
    groups = np.array([p.chain for p in prompts])
    usual = groups >= 0
    figures: Figures = {}
    images: dict[str, list[Image.Image]] = {}
    means: dict[str, np.ndarray] = {}
    for model in (LARGE, SMALL):
        jobs = [Job(model, p.text, p.seed) for p in prompts]
        images[model] = draw_all(jobs, work / "pictures", processes=processes, label=model)
        accuracy = attribute_accuracy(images[model], scenes)
        figures[model] = {name: mean_se(accuracy[name][usual], groups[usual]) for name in ("mean", *ATTRIBUTES)}
        held_out = accuracy["mean"][~usual]
        figures[model]["held_out_combinations"] = mean_se(held_out, np.arange(len(held_out)))
        means[model] = accuracy["mean"]
    rendered = attribute_accuracy([render(s, i) for i, s in enumerate(scenes)], scenes)["mean"]
    figures["classifier_on_rendered"] = round(float(rendered.mean()), 4)
    figures["large_minus_small"] = mean_se((means[LARGE] - means[SMALL])[usual], groups[usual])
    return figures, images, means


def evaluate_refining(
    prompts: Sequence[Prompt],
    large_images: Sequence[Image.Image],
    large_quality: np.ndarray,
    rungs: Sequence[Rung],
    work: Path,
    processes: int,
) -> tuple[list[Figures], dict[int, list[tuple[str, Image.Image, str, Image.Image]]]]:
    """Every rung: prompts refined from large pictures whose similarity falls on that rung, against large itself.

    A rung reaches up to the next one, but at least `BAND` far: the deepest rungs lie so close together that too few
    pairs would fall between them.
    """
    chained = [p for p in prompts if p.chain >= 0]
    images = list(large_images[: len(chained)])
    similarity = chain_similarity(chained, embed_texts([p.text for p in chained]), embed_images(images))
    rng = np.random.default_rng(9)
    pairs: dict[int, list[tuple[int, int]]] = {r.skipped_steps: [] for r in rungs}
    for i, p in enumerate(chained):
        for member in range(CHAIN_LENGTH):
            for rung, upper in zip(rungs, [1.0, *(r.min_similarity for r in rungs)], strict=False):
                if rung.min_similarity <= similarity[i, member] < max(upper, rung.min_similarity + BAND):
                    pairs[rung.skipped_steps].append((i, p.chain * CHAIN_LENGTH + member))
    figures: list[Figures] = []
    shown: dict[int, list[tuple[str, Image.Image, str, Image.Image]]] = {}
    for rung in rungs:
        chosen = pairs[rung.skipped_steps]
        if len(chosen) > PAIRS_PER_RUNG:
            chosen = [chosen[k] for k in sorted(rng.choice(len(chosen), PAIRS_PER_RUNG, replace=False))]
        if not chosen:
            continue
        jobs = []
        for i, source in chosen:
            at = str(Job(LARGE, chained[source].text, chained[source].seed).path(work / "pictures"))
            jobs.append(Job(SMALL, chained[i].text, chained[i].seed + 7, at, rung.skipped_steps))
        label = f"refine k={rung.skipped_steps}"
        refined = draw_all(jobs, work / "pictures", processes=processes, label=label)
        rows = np.array([i for i, _ in chosen])
        groups = np.array([chained[i].chain for i in rows])
        scenes = [chained[i].scene for i in rows]
        quality = attribute_accuracy(refined, scenes)["mean"]
        unrefined = attribute_accuracy([images[s] for _, s in chosen], scenes)["mean"]
        figures.append(
            {
                "min_similarity": rung.min_similarity,
                "skipped_steps": rung.skipped_steps,
                "prompts": len(set(rows.tolist())),
                "source_as_is": round(float(unrefined.mean()), 4),
                "refined": mean_se(quality, groups),
                "of_large": ratio_se(quality, large_quality[rows], groups),
            }
        )
        different = [n for n, (i, s) in enumerate(chosen) if i != s] or list(range(len(chosen)))
        picks = different[:: max(1, len(different) // 8)][:8]
        shown[rung.skipped_steps] = [
            (chained[chosen[n][1]].text, images[chosen[n][1]], chained[chosen[n][0]].text, refined[n]) for n in picks
        ]
    return figures, shown


def evaluate_clip(count: int = 1000) -> Figures:
    """Retrieval among `count` different rendered scenes, and paired tests on swapped colours and positions."""
    scenes = sample_scenes(991, count, allow_held_out=True)
    rng = np.random.default_rng(1)
    texts = embed_texts([caption(s, rng) for s in scenes])
    images = embed_images([render(s, 5000 + i) for i, s in enumerate(scenes)])
    hits = ((texts @ images.T).argmax(1) == np.arange(count)).astype(float)
    figures: Figures = {"r_at_1": mean_se(hits, np.arange(count))}
    own = (texts * images).sum(1)
    figures["cosine_own_picture"] = round(float(own.mean()), 4)
    figures["cosine_other_picture"] = round(float((texts @ images.T)[~np.eye(count, dtype=bool)].mean()), 4)
    pairs = [i for i, s in enumerate(scenes) if len(s.objects) == 2]
    for name, swap in (("swapped_colours", swap_colours), ("swapped_positions", swap_positions)):
        swapped = _swap_cosine([scenes[i] for i in pairs], swap, images[pairs], rng)
        figures[name] = mean_se((own[pairs] > swapped).astype(float), np.arange(len(pairs)))
    return figures


def _swap_cosine(scenes: Sequence[Scene], swap: Any, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    texts = embed_texts([caption(swap(s), rng) for s in scenes])
    cosines: np.ndarray = (texts * images).sum(1)
    return cosines


def measure_speed(prompt: str, repeats: int = 5) -> Figures:
    """CPU seconds of one guided 50-step picture on one thread, median of `repeats` (the models take turns)."""
    painters = {model: Painter(model, threads=1) for model in (LARGE, SMALL)}
    spent: dict[str, list[float]] = {model: [] for model in painters}
    for round_number in range(repeats + 1):
        for model, painter in painters.items():
            began = time.process_time()
            painter.draw([prompt], [round_number])
            if round_number:  # the first round warms up
                spent[model].append(time.process_time() - began)
    median = {model: float(np.median(values)) for model, values in spent.items()}
    return {
        "large_s": round(median[LARGE], 3),
        "small_s": round(median[SMALL], 3),
        "ratio": round(median[LARGE] / median[SMALL], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=work_folder())
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--gate", action="store_true", help="exit 4 when a bar is missed")
    arguments = parser.parse_args()
    prompts = read_eval_prompts()
    speed = measure_speed(prompts[0].text)
    clip = evaluate_clip()
    drawing, images, means = evaluate_drawing(prompts, arguments.work, arguments.processes)
    rungs = read_ladder()
    refining, shown = evaluate_refining(
        prompts, images[LARGE], means[LARGE], rungs, arguments.work, arguments.processes
    )
    figures: Figures = {
        "schema_version": 1,
        "speed": speed,
        "clip": clip,
        "drawing": drawing,
        "refining": refining,
        "weights": weight_files(),
        "ladder": json.loads((CLIP_FOLDER / "ladder.json").read_text())["rungs"],
    }
    three_rows_sheet([p.text for p in prompts], [render(p.scene, 0) for p in prompts], images[LARGE], images[SMALL])
    refined_sheet(shown)
    bars = write_card(figures)
    for bar in bars:
        print(f"{'pass' if bar['met'] else 'MISS'}  {bar['name']}: {bar['value']} (bar {bar['bar']})")
    if arguments.gate and not all(bar["met"] for bar in bars):
        raise SystemExit(4)


if __name__ == "__main__":
    main()
