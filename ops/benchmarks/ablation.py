"""Each mechanism on the real stack at saturation: speed and quality side by side, so that one is not bought with the other.

    python -m ops.benchmarks.ablation --out DIR [--requests 150] [--repeats 3] [--budget-s 480]

The `scenes` trace is offered all at once to a stack of two workers; every run has a cold cache (a namespace of its own).
Each run leaves ``DIR/<system>/<repeat>.json`` and its image vectors, and is not measured again, so the command may be
ended and started over: with ``--budget-s`` it starts no run after so many seconds. Whenever it ends it writes
``ablation.json``, ``ablation.md`` and ``ablation.png`` from what is there. Exit status 0, or 1 where a run lost requests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modm_tasks.client import Client
from modm_tasks.messages import RequestRecord, Route, State
from modm_tasks.output import note
from ops.benchmarks import ablation_table
from ops.benchmarks.serving import WORKERS, serving
from ops.demo import TRACE
from ops.scenes.export import LARGE, STEPS
from orchestrator.decisions.routing import FEATURES
from orchestrator.report.progress import shown
from orchestrator.run_trace import RunPlan, run_trace
from orchestrator.targets import HttpTarget
from orchestrator.traces.load import load_trace

REPEATS, USERS = 3, 2


@dataclass(frozen=True, kw_only=True)
class System:
    """What each request of a run asks for."""

    name: str
    policy: str
    features: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The load of every run. ``arrivals``: ``burst`` = all at once, ``closed`` = as many users as workers."""

    requests: int = 150
    arrivals: str = "burst"


SYSTEMS = (
    System(name="large-only", policy="large-only"),
    System(name="modm", policy="modm"),
    *(System(name=f"modm + {name}", policy="modm", features=name) for name in FEATURES),
    System(name="modm-plus (all)", policy="modm-plus", features=",".join(FEATURES)),
)


def folder_of(out: Path, system: System) -> Path:
    """Where the runs of a system lie."""
    return out / system.name.replace(" ", "").replace("(all)", "")


def measure(client: Client, system: System, repeat: int, load: Plan, folder: Path, images: Path) -> dict[str, Any]:
    """One run: replay, then judge its images. Writes the vectors, then the figures (whose presence says: measured)."""
    from ops.benchmarks import judge

    target = HttpTarget(client)
    plan = RunPlan(
        rows=load_trace(TRACE, num_requests=load.requests).rows, arrivals=load.arrivals, concurrency=USERS,
        policy=system.policy,
        features=system.features, namespace=f"ablation-{folder.name.replace('+', '-')}-{repeat}-{int(time.time())}",
        name=f"{system.name} {repeat}",
    )  # fmt: skip
    run = run_trace(target, plan, shown=shown, sheet=False)
    if run.result.interrupted:
        raise KeyboardInterrupt
    done = [r for r in run.result.records if r.state is State.DONE]
    files = [images / f"{n}.png" for n in range(len(done))]
    for record, file in zip(done, files, strict=True):
        target.image(record.id, file)
    pictures = [judge.read_image(f) for f in files]
    right = judge.accuracy(pictures, [r.request.prompt for r in done])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{repeat}.npz", vectors=judge.vectors(pictures).astype(np.float32))
    found = figures(run.report, done, right) | {"system": system.name, "repeat": repeat}
    (folder / f"{repeat}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def figures(report: dict[str, Any], done: Sequence[RequestRecord], right: np.ndarray) -> dict[str, Any]:
    """What is kept of a run. ``wrong``: images with any attribute wrong, by what became of the request."""
    refined = [r.decision is not None and r.decision.route is Route.SMALL_REFINE for r in done]
    escalated = [r.completion is not None and r.completion.escalated for r in done]
    return {
        "requests": report["requests"],
        "served_per_min": report["served_per_min"],
        "hit_rate": report["hit_rate"],
        "latency_s": report["latency_s"],
        "clip_score": report["clip_score"]["mean"],
        "skipped_steps": report["skipped_steps"],
        "depth": report["depth"],
        "accuracy": round(float(right.mean()), 4) if len(right) else None,
        "refined": {"n": sum(refined), "wrong": int(sum(a < 1 for a, is_one in zip(right, refined, strict=True) if is_one))},
        "escalated": {
            "n": sum(escalated),
            "wrong": int(sum(a < 1 for a, is_one in zip(right, escalated, strict=True) if is_one)),
        },
        "seconds": {"large": _seconds(done, large=True), "small": _seconds(done, large=False)},
        "prompts": [r.request.prompt for r in done],
        "machine": report["machine"],
    }  # fmt: skip


def _seconds(done: Sequence[RequestRecord], *, large: bool) -> float | None:
    """Mean drawing time of a full image of STEPS steps, from those that were drawn by this model; None without any."""
    drawn = [
        r.completion.gpu_s * STEPS / r.completion.steps_run
        for r in done
        if r.completion is not None and r.completion.steps_run and (r.completion.model == LARGE) == large
    ]
    return round(float(np.mean(drawn)), 4) if drawn else None


def run_missing(out: Path, systems: Sequence[System], plan: Plan, *, repeats: int, budget_s: float) -> bool:
    """Measure what is not there yet, the repeats of all systems in turn. Returns whether all is there."""
    wanted = [(s, n) for n in range(1, repeats + 1) for s in systems if not (folder_of(out, s) / f"{n}.json").is_file()]
    if not wanted:
        return True
    began = time.monotonic()
    with serving() as (client, home):
        for system, repeat in wanted:
            if time.monotonic() - began > budget_s:
                return False
            with tempfile.TemporaryDirectory(dir=home) as images:
                found = measure(client, system, repeat, plan, folder_of(out, system), Path(images))
            note(f"{system.name} {repeat}: {ablation_table.line(found)}")
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.ablation", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--requests", type=int, default=Plan.requests, help="of each run")
    parser.add_argument(
        "--arrivals", choices=["burst", "closed"], default="burst",
        help="closed: two users, no backlog, so that verification is bought",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--systems", default="", help="comma list of names; default all")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start no run after so many seconds")
    given = parser.parse_args(argv)
    names = {name.strip() for name in given.systems.split(",") if name.strip()}
    systems = [s for s in SYSTEMS if not names or s.name in names]
    if unknown := names - {s.name for s in SYSTEMS}:
        parser.error(f"no system {sorted(unknown)[0]!r}; there are {', '.join(s.name for s in SYSTEMS)}")
    plan = Plan(requests=given.requests, arrivals=given.arrivals)
    complete = run_missing(given.out, systems, plan, repeats=given.repeats, budget_s=given.budget_s)
    result = ablation_table.gather([(s.name, folder_of(given.out, s)) for s in SYSTEMS], workers=WORKERS)
    ablation_table.write(given.out, result)
    print((given.out / "ablation.md").read_text(), end="")
    note("all runs are there" if complete else "runs are missing; start the command again to go on")
    if any(row["lost"] for row in result["systems"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
