"""From the runs of the ablation to its table: JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from orchestrator.decisions.ladder import Ladder, load_ladder
from vector_store.embedder import bundled_folder


def line(run: Mapping[str, Any]) -> str:
    """One run in words."""
    return (
        f"{run['served_per_min']:.1f} a minute, hit rate {run['hit_rate']:.2f}, CLIP {run['clip_score']:.3f}, "
        f"accuracy {run['accuracy']:.4f}, {run['escalated']['n']} escalated"
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(fmean(values), 4), "sd": round(stdev(values), 4) if len(values) > 1 else 0.0}


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    refined, escalated = ([r[kind] for r in runs] for kind in ("refined", "escalated"))
    n_refined = sum(r["n"] for r in refined)
    return {
        "system": name,
        "repeats": len(runs),
        "requests": sum(r["requests"]["submitted"] for r in runs),
        "lost": sum(r["requests"]["submitted"] - r["requests"]["done"] for r in runs),
        "served_per_min": _spread([r["served_per_min"] for r in runs]),
        "hit_rate": _spread([r["hit_rate"] or 0.0 for r in runs]),
        "clip_score": _spread([r["clip_score"] for r in runs]),
        "accuracy": _spread([r["accuracy"] for r in runs]),
        "refined": n_refined,
        "refined_right": round(1 - sum(r["wrong"] for r in refined) / n_refined, 4) if n_refined else None,
        "escalated": sum(r["n"] for r in escalated),
        "p50_s": round(fmean(r["latency_s"]["p50"] for r in runs), 3),
        "p99_s": round(fmean(r["latency_s"]["p99"] for r in runs), 3),
    }


def fluid_bound_per_min(
    prompts: Sequence[str], ladder: Ladder, *, large_s: float, small_s: float, workers: int
) -> float:
    """Workers over the mean drawing time if every request took the best rung that any earlier one promises (the issue's
    bound, with similarity by the ladder's prediction). Embedding, queues and storage take nothing in it."""
    from ops.scenes.embed import embed_texts

    texts, total_s = embed_texts(prompts), 0.0
    for i in range(len(prompts)):
        best = float((texts[:i] @ texts[i]).max()) if i else 0.0
        rung = ladder.lookup(ladder.predict(best))
        total_s += large_s if rung is None else small_s * (1 - rung.skipped_steps / ladder.num_inference_steps)
    return 60 * workers * len(prompts) / total_s


def _bound(runs: Sequence[Mapping[str, Any]], workers: int) -> float | None:
    """Of this machine, from the drawing times of all runs; None where one of the models drew nothing."""
    seconds = {m: [r["seconds"][m] for r in runs if r["seconds"][m] is not None] for m in ("large", "small")}
    if not all(seconds.values()):
        return None
    ladder = load_ladder(bundled_folder("scenes-clip") / "ladder.json")
    means = {f"{m}_s": fmean(values) for m, values in seconds.items()}
    return round(fluid_bound_per_min(runs[0]["prompts"], ladder, **means, workers=workers), 1)


def gather(folders: Sequence[tuple[str, Path]], *, workers: int) -> dict[str, Any]:
    """All runs that are there. The Fréchet distance is taken over the images of all repeats of a system together."""
    from ops.benchmarks import judge

    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    floor = None
    machine: dict[str, Any] = {}
    every: list[Mapping[str, Any]] = []
    for name, folder in folders:
        files = sorted(folder.glob("*.json"))
        runs = [json.loads(f.read_text()) for f in files]
        if not runs:
            continue
        machine = runs[0]["machine"]
        every += runs
        if reference is None:
            prompts = sorted({p for r in runs for p in r["prompts"]})
            reference = judge.reference(prompts)
            floor = judge.frechet(judge.reference(prompts, first_seed=10**6, times=1), reference)
        vectors = np.concatenate([np.load(f.with_suffix(".npz"))["vectors"] for f in files])
        rows.append(_row(name, runs) | {"frechet": round(judge.frechet(vectors, reference), 2)})
    base = next((r["served_per_min"]["mean"] for r in rows if r["system"] == "large-only"), None)
    bound = _bound(every, workers) if every else None
    for row in rows:
        row["of_bound"] = round(row["served_per_min"]["mean"] / bound, 2) if bound else None
        row["speedup"] = round(row["served_per_min"]["mean"] / base, 2) if base else None
    return {
        "schema_version": 1,
        "machine": machine,
        "fluid_bound_per_min": bound,
        "frechet_of_renderings": None if floor is None else round(floor, 2),
        "systems": rows,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Mean and standard deviation over the repeats."""
    columns = (
        "system", "images per minute", "over large-only", "of the fluid bound", "hit rate", "CLIP score",
        "attribute accuracy", "hits all right", "Fréchet x 1,000", "escalated", "latency p50 / p99, s",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in result["systems"]:
        speed, clip, right = (r[k] for k in ("served_per_min", "clip_score", "accuracy"))
        cells = (
            r["system"],
            f"{speed['mean']:.1f} ± {speed['sd']:.1f}",
            r["speedup"] or "-",
            r["of_bound"] or "-",
            f"{r['hit_rate']['mean']:.2f}",
            f"{clip['mean']:.3f} ± {clip['sd']:.3f}",
            f"{right['mean']:.4f} ± {right['sd']:.4f}",
            "-" if r["refined_right"] is None else f"{r['refined_right']:.3f}",
            f"{r['frechet']:.1f}",
            r["escalated"],
            f"{r['p50_s']:.2f} / {r['p99_s']:.2f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    repeats = ", ".join(map(str, sorted({r["repeats"] for r in result["systems"]})))
    lines += [
        "",
        f"Repeats: {repeats}. Fluid bound: {result['fluid_bound_per_min']} a minute. Fréchet distance of other renderings "
        f"to the reference: {result['frechet_of_renderings']}. Machine: {result['machine'].get('cpu', 'not noted')}.",
    ]
    return "\n".join(lines) + "\n"


def plot(result: Mapping[str, Any]) -> bytes:
    """Throughput against attribute accuracy, a point for each system: up and to the right is better."""
    from orchestrator.report.plots import COLOURS, figure

    markers = "osD^vP*X<>"

    def draw(axes: Any) -> None:
        for n, row in enumerate(result["systems"]):
            speed, right = row["served_per_min"], row["accuracy"]
            axes.errorbar(
                speed["mean"], right["mean"], xerr=speed["sd"], yerr=right["sd"], label=row["system"],
                color=COLOURS[n % len(COLOURS)], marker=markers[n % len(markers)], markersize=7, linestyle="none",
            )  # fmt: skip
        axes.set(xlabel="images per minute", ylabel="attribute accuracy")
        axes.set_xlim(left=0)
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)

    return figure(draw, width=7.2, height=4.6)


def write(out: Path, result: Mapping[str, Any]) -> None:
    """``ablation.json``, ``ablation.md``, ``ablation.png``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "ablation.md").write_text(markdown(result))
    if result["systems"]:
        (out / "ablation.png").write_bytes(plot(result))
