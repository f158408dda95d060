"""Quality against generation depth on `scenes`: what ``cache.max_depth`` should be.

    python -m ops.benchmarks.generations --out FILE.json [--chains 60] [--length 8] [--work DIR]

Users' chains of one-attribute edits: the first prompt is drawn by the large model (depth 0), each next one refined from
the image before it (depth 1, 2, 3, ...), as the ladder says. Beside each stands the same prompt refined from the large
model's own image of the prompt before (depth 1 always): the difference is what depth alone costs. Pictures are kept in the
work folder of `ops.scenes`, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ops.scenes.calibrate import read_ladder, rung_depth
from ops.scenes.classifier import attribute_accuracy
from ops.scenes.embed import embed_images, embed_texts
from ops.scenes.export import LARGE, SMALL
from ops.scenes.generate import Job, draw_all
from ops.scenes.holdout import chains
from ops.scenes.loop import work_folder
from orchestrator.report.machine import describe

#: A depth is allowed while its quality stays at this share of what depth 1 gives for the same prompts.
KEPT = 0.99
SEED = 505


def measure(n_chains: int, length: int, work: Path, processes: int) -> list[dict[str, Any]]:
    """One row a depth, over the chains that were hits all the way down."""
    prompts = chains(SEED, n_chains, length)
    folder, rungs = work / "pictures", read_ladder()
    scenes, texts = [p.scene for p in prompts], embed_texts([p.text for p in prompts])
    large_jobs = [Job(LARGE, p.text, p.seed) for p in prompts]
    large = draw_all(large_jobs, folder, processes=processes, label="generations large")
    large_vectors = embed_images(large)
    large_right = attribute_accuracy(large, scenes)["mean"]
    firsts = list(range(0, len(prompts), length))
    #: By chain: where its last image lies, and its vector.
    alive = {i: (str(large_jobs[i].path(folder)), large_vectors[i]) for i in firsts}
    rows: list[dict[str, Any]] = [
        _row(0, large_right[firsts], large_right[firsts], (texts * large_vectors).sum(1)[firsts])
    ]
    for depth in range(1, length):
        chained: dict[int, Job] = {}
        fresh: dict[int, Job] = {}
        for first, (path, vector) in alive.items():
            i = first + depth
            if (k := rung_depth(rungs, float(texts[i] @ vector))) > 0:
                chained[first] = Job(SMALL, prompts[i].text, prompts[i].seed + 7, path, k)
            if (k := rung_depth(rungs, float(texts[i] @ large_vectors[i - 1]))) > 0:
                source = str(large_jobs[i - 1].path(folder))
                fresh[first] = Job(SMALL, prompts[i].text, prompts[i].seed + 7, source, k)
        both = sorted(set(chained) & set(fresh))
        if not both:
            break
        label = f"generation {depth}"
        images = draw_all([chained[f] for f in both], folder, processes=processes, label=label)
        beside = draw_all([fresh[f] for f in both], folder, processes=processes, label=f"{label}, fresh source")
        vectors, at = embed_images(images), [f + depth for f in both]
        asked = [scenes[i] for i in at]
        rows.append(
            _row(
                depth,
                attribute_accuracy(images, asked)["mean"],
                large_right[at],
                (texts[at] * vectors).sum(1),
                attribute_accuracy(beside, asked)["mean"],
                [chained[f].skipped_steps for f in both],
            )
        )
        alive = {f: (str(chained[f].path(folder)), v) for f, v in zip(both, vectors, strict=True)}
    return rows


def _row(
    depth: int, right: np.ndarray, large: np.ndarray, clip: np.ndarray, fresh: np.ndarray | None = None,
    skipped: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    n = len(right)
    row: dict[str, Any] = {
        "depth": depth,
        "chains": n,
        "accuracy": round(float(right.mean()), 4),
        "se": round(float(right.std(ddof=1) / np.sqrt(n)), 4) if n > 1 else None,
        "large_accuracy": round(float(large.mean()), 4),
        "clip_score": round(float(clip.mean()), 4),
        "mean_skipped_steps": round(float(np.mean(skipped)), 2) if len(skipped) else 0.0,
    }
    if fresh is None:
        return row | {"fresh_accuracy": None, "of_fresh": None, "of_fresh_se": None}
    gap = right - fresh
    return row | {
        "fresh_accuracy": round(float(fresh.mean()), 4),
        "of_fresh": round(float(right.mean() / fresh.mean()), 4),
        "of_fresh_se": round(float(gap.std(ddof=1) / np.sqrt(n) / fresh.mean()), 4) if n > 1 else None,
    }


def deepest(rows: Sequence[dict[str, Any]], kept: float = KEPT) -> int:
    """Deepest image that may be a source: one less than the last generation before the first whose quality is below
    ``kept``, and so never more than was measured."""
    kept_up = 0
    for row in rows:
        if row["of_fresh"] is not None and row["of_fresh"] < kept:
            break
        kept_up = int(row["depth"])
    return max(0, kept_up - 1)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/policies.md."""
    lines = [
        "| depth | chains | attribute accuracy | from a large source | ratio | large model itself | CLIP score | mean k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        fresh, ratio = ("-", "-") if r["of_fresh"] is None else (
            f"{r['fresh_accuracy']:.4f}", f"{r['of_fresh']:.3f} ± {r['of_fresh_se'] or 0:.3f}"
        )  # fmt: skip
        lines.append(
            f"| {r['depth']} | {r['chains']} | {r['accuracy']:.4f} ± {r['se'] or 0:.4f} | {fresh} | {ratio} "
            f"| {r['large_accuracy']:.4f} | {r['clip_score']:.3f} | {r['mean_skipped_steps']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.generations", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chains", type=int, default=60)
    parser.add_argument("--length", type=int, default=8, help="prompts of a chain, one more than the deepest image")
    parser.add_argument("--work", type=Path, default=work_folder())
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(argv)
    rows = measure(given.chains, given.length, given.work, given.processes)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"schema_version": 1, "kept": KEPT, "deepest_source": deepest(rows), "machine": describe(),
                    "generations": rows}, indent=1) + "\n"
    )  # fmt: skip
    print(markdown(rows))
    print(f"deepest source that keeps {KEPT:g} of depth 1's quality: {deepest(rows)}")


if __name__ == "__main__":
    main()
