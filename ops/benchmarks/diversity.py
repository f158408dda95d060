"""How alike the images of a prompt are that is asked for again and again without a seed, on the real stack.

    python -m ops.benchmarks.diversity --out FILE.json [--prompts 30] [--repeats 6]

Each system serves every prompt ``--repeats`` times, one round of all prompts after the other, two users, cold cache. The
large model alone is the measure: whatever is more alike than its images are is variety that the cache has cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from modm_tasks.client import Client
from modm_tasks.messages import State
from modm_tasks.output import note
from ops.benchmarks.serving import serving
from ops.scenes.holdout import chains
from orchestrator.report.progress import shown
from orchestrator.run_trace import RunPlan, run_trace
from orchestrator.targets import HttpTarget
from orchestrator.traces.rows import TraceRow

SYSTEMS = (
    ("large-only", "large-only", ""),
    ("modm", "modm", ""),
    ("modm + repeats", "modm", "repeats"),
    ("modm-plus (all)", "modm-plus", ""),
)
PROMPT_SEED = 707


def measure(
    client: Client, system: tuple[str, str, str], prompts: Sequence[str], repeats: int, home: Path
) -> dict[str, Any]:
    """Figures of one system: means over prompts of the mean over pairs of a prompt's images."""
    from ops.benchmarks import judge

    name, policy, features = system
    target = HttpTarget(client)
    rows = [TraceRow(prompt=p) for _ in range(repeats) for p in prompts]
    plan = RunPlan(
        rows=rows, arrivals="closed", concurrency=2, policy=policy, features=features or None,
        namespace=f"diversity-{uuid4().hex[:8]}", name=name,
    )  # fmt: skip
    run = run_trace(target, plan, shown=shown, sheet=False)
    done = [r for r in run.result.records if r.state is State.DONE]
    images: dict[str, list[Any]] = {}
    for record in done:
        file = home / f"{record.id}.image.png"
        target.image(record.id, file)
        images.setdefault(record.request.prompt, []).append(judge.read_image(file))
    alike, apart = [], []
    for group in images.values():
        alike.append(judge.pairwise_similarity(judge.vectors(group)))
        apart.append(_pixel_distance(np.stack([np.asarray(i, dtype=np.float64) / 255 for i in group])))
    flat = [(p, i) for p, group in images.items() for i in group]
    hits = [r.decision.skipped_steps for r in done if r.decision is not None and r.decision.source_id is not None]
    return {
        "system": name,
        "images": len(done),
        "hit_rate": run.report["hit_rate"],
        "mean_skipped_steps": round(float(np.mean(hits)), 2) if hits else None,
        "pairwise_similarity": {"mean": round(float(np.mean(alike)), 4), "se": _error(alike)},
        "pixel_distance": {"mean": round(float(np.mean(apart)), 4), "se": _error(apart)},
        "accuracy": round(float(judge.accuracy([i for _, i in flat], [p for p, _ in flat]).mean()), 4),
        "served_per_min": run.report["served_per_min"],
    }


def _pixel_distance(pixels: np.ndarray) -> float:
    """Mean over pairs of the root mean square difference, 0..1."""
    n = len(pixels)
    found = [np.sqrt(((pixels[a] - pixels[b]) ** 2).mean()) for a in range(n) for b in range(a)]
    return float(np.mean(found)) if found else float("nan")


def _error(values: Sequence[float]) -> float | None:
    return round(float(np.std(values, ddof=1) / np.sqrt(len(values))), 4) if len(values) > 1 else None


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/policies.md."""
    lines = [
        "| system | pairwise similarity | pixel distance | mean k of hits | attribute accuracy | images per minute |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        alike, apart = r["pairwise_similarity"], r["pixel_distance"]
        lines.append(
            f"| {r['system']} | {alike['mean']:.3f} ± {alike['se']:.3f} | {apart['mean']:.3f} ± {apart['se']:.3f} "
            f"| {r['mean_skipped_steps'] or '-'} | {r['accuracy']:.4f} | {r['served_per_min']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, print the table."""
    from orchestrator.report.machine import describe

    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.diversity", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=6)
    given = parser.parse_args(argv)
    prompts = [p.text for p in chains(PROMPT_SEED, given.prompts)][::5]  # the first of each chain: unlike one another
    rows = []
    with serving() as (client, home):
        for system in SYSTEMS:
            rows.append(measure(client, system, prompts, given.repeats, home))
            note(f"{system[0]}: {json.dumps(rows[-1])}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"schema_version": 1, "prompts": len(prompts), "repeats": given.repeats, "machine": describe(),
                    "systems": rows}, indent=1) + "\n"
    )  # fmt: skip
    print(markdown(rows))


if __name__ == "__main__":
    main()
