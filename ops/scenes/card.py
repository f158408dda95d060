"""The model card: bars, figures and file hashes as `model_card.json`, and the same as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ops.scenes.export import DIFFUSION_FOLDER, LARGE, SMALL
from ops.scenes.scene import ATTRIBUTES

CARD_JSON, CARD_MD = DIFFUSION_FOLDER / "model_card.json", DIFFUSION_FOLDER / "MODEL_CARD.md"
MIB = 1024 * 1024


def bars(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar with the measured value and whether it is met."""
    drawing, clip, speed = figures["drawing"], figures["clip"], figures["speed"]
    sizes = [f["bytes"] for f in figures["weights"].values()]
    out = [
        _bar("scenes-large, mean attribute accuracy", drawing[LARGE]["mean"]["mean"], ">=", 0.95),
        _bar("scenes-large, shape accuracy", drawing[LARGE]["shape"]["mean"], ">=", 0.85),
        _bar("large minus small from noise (paired)", drawing["large_minus_small"]["mean"], ">=", 0.03),
        _bar("large / small, CPU seconds an image", speed["ratio"], ">=", 4.0),
        _bar("scenes-large, CPU seconds an image", speed["large_s"], "<=", 1.5),
        _bar("scenes-clip, text-to-image R@1 of 1,000", clip["r_at_1"]["mean"], ">=", 0.85),
        _bar("scenes-clip, swapped colours told apart", clip["swapped_colours"]["mean"], ">", 0.8),
        _bar("scenes-clip, swapped positions told apart", clip["swapped_positions"]["mean"], ">", 0.8),
        _bar("weights together, MiB", round(sum(sizes) / MIB, 2), "<=", 60),
        _bar("largest weight file, MiB", round(max(sizes) / MIB, 2), "<", 15),
    ]
    for row in figures["refining"]:
        name = f"refined at k={row['skipped_steps']}, share of large"
        out.append(_bar(name, row["of_large"]["ratio"], ">=", 0.97))
    return out


def _bar(name: str, value: float, sign: str, bound: float) -> dict[str, Any]:
    met = {">=": value >= bound, ">": value > bound, "<=": value <= bound, "<": value < bound}[sign]
    return {"name": name, "value": value, "bar": f"{sign} {bound:g}", "met": met}


def write_card(
    figures: dict[str, Any], json_path: Path = CARD_JSON, markdown_path: Path = CARD_MD
) -> list[dict[str, Any]]:
    """Writes both files; returns the bars."""
    judged = bars(figures)
    json_path.write_text(json.dumps({**figures, "bars": judged}, indent=2) + "\n")
    markdown_path.write_text(markdown(figures, judged))
    return judged


def _shortfall(judged: list[dict[str, Any]]) -> list[str]:
    """What a missed bar means for whoever reads quality figures off these models."""
    if all(bar["met"] for bar in judged if "minus small" in bar["name"]):
        return []
    return [
        f"`{SMALL}` learned too much: its edges are rougher, but the judge reads its pictures nearly as well as those of",
        f"`{LARGE}`. Speed figures stand; a quality gap between the two must not be argued from these weights.",
        "Why the bar and the rungs below exclude each other here: `docs/decisions/0009-small-model.md`.",
        "",
    ]


def markdown(figures: dict[str, Any], judged: list[dict[str, Any]]) -> str:
    drawing, clip, speed = figures["drawing"], figures["clip"], figures["speed"]
    lines = [
        "# The `scenes` models",
        "",
        "Three small models trained from scratch, by the committed recipe (`make train-scenes`), on procedurally drawn",
        "64x64 scenes: `scenes-clip` (open_clip), `scenes-large` and `scenes-small` (diffusers, Stable Diffusion 3",
        "family). They draw one or two coloured shapes on a background and nothing else; any other prompt gives noise",
        "of that kind. They are meant for demos, tests and quality measurements without a download.",
        "",
        "Written by `make eval-scenes`; `model_card.json` beside this file holds the same figures and the file hashes.",
        "Accuracy is judged by an independent classifier trained on rendered scenes; it reads rendered pictures of the",
        f"evaluation's scenes at {drawing['classifier_on_rendered']:.3f}. Prompts are unseen scenes in chains of",
        "one-attribute edits; standard errors are over chains.",
        "",
        "| bar | asked | measured | |",
        "|---|---|---|---|",
        *(f"| {b['name']} | {b['bar']} | {b['value']} | {'met' if b['met'] else '**missed**'} |" for b in judged),
        "",
        *_shortfall(judged),
        "## Attribute accuracy from noise, 50 steps",
        "",
        f"| attribute | {LARGE} | {SMALL} |",
        "|---|---|---|",
    ]
    for name in ("mean", *ATTRIBUTES, "held_out_combinations"):
        cells = (f"{drawing[m][name]['mean']:.3f} ± {drawing[m][name]['se']:.3f}" for m in (LARGE, SMALL))
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    gap = drawing["large_minus_small"]
    lines += [
        "",
        f"{drawing[LARGE]['mean']['n']} prompts (and {drawing[LARGE]['held_out_combinations']['n']} of combinations",
        f"that training never showed); large minus small {gap['mean']:.3f} ± {gap['se']:.3f}.",
        "",
        f"## `{SMALL}` refining cached `{LARGE}` pictures, by rung of the ladder",
        "",
        "| from similarity | skipped steps | source as it is | refined | share of large | pairs (prompts) |",
        "|---|---|---|---|---|---|",
    ]
    for r in figures["refining"]:
        lines.append(
            f"| {r['min_similarity']} | {r['skipped_steps']} | {r['source_as_is']:.3f} "
            f"| {r['refined']['mean']:.3f} ± {r['refined']['se']:.3f} "
            f"| {r['of_large']['ratio']:.3f} ± {r['of_large']['se']:.3f} | {r['refined']['n']} ({r['prompts']}) |"
        )
    lines += [
        "",
        "## Speed and retrieval",
        "",
        f"One guided 50-step picture on one CPU thread: large {speed['large_s']} s, small {speed['small_s']} s "
        f"({speed['ratio']} times).",
        f"CLIP: R@1 {clip['r_at_1']['mean']:.3f} ± {clip['r_at_1']['se']:.3f} among 1,000 pictures, swapped colours "
        f"{clip['swapped_colours']['mean']:.3f}, swapped positions {clip['swapped_positions']['mean']:.3f}; "
        f"cosine to the own picture {clip['cosine_own_picture']}, to another {clip['cosine_other_picture']}.",
        "",
        "Contact sheets: `docs/images/scenes-rendered-large-small.png`, `docs/images/scenes-refined.png`.",
        "",
    ]
    return "\n".join(lines)
