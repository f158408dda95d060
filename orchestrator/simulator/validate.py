"""The simulator against a run of the real stack: same arrivals, same similarities, this machine's own times.

From a report folder of `modm submit-trace --report` come each request's arrival, its source and k (so that the real
similarities are used), and the times. The first part of the run calibrates the times, the whole run is then simulated:
whether a source is finished when it is looked for, queues, waits and the closed loop are the simulator's own.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modm_tasks.errors import InvalidInputError, NotFoundError
from orchestrator.decisions.ladder import Ladder, Rung
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.engine import Simulation
from orchestrator.simulator.similarity import Pairs

#: Share of the run, from its start, that calibrates; a first request may still load or compile something.
CALIBRATION = 1 / 3
MAX_THROUGHPUT_ERROR, MAX_LATENCY_ERROR = 0.10, 0.15
#: Recorded decisions carry k, not the ladder: rung k stands at the made-up similarity k / SCALE.
SCALE = 1000.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request of requests.csv; ``source`` and ``waited`` are row numbers, 0 = an image from before the run."""

    arrival_s: float
    claimed_s: float
    done_s: float
    k: int
    source: int | None
    waited: int | None
    model: str


class RecordedSimilarities:
    """What the real router found, one source for each request. Row 0 stands for the images from before the run."""

    always_cached = False

    def __init__(self, rows: Sequence[Row]) -> None:
        self.n, self.warm = len(rows) + 1, 1
        self._rows = rows
        self._readers: dict[int, list[tuple[int, float]]] = {}
        for i, row in enumerate(rows, 1):
            if row.source:
                self._readers.setdefault(row.source, []).append((i, row.k / SCALE))

    def images(self, i: int) -> Pairs:
        row = self._rows[i - 1]
        return () if row.source is None else ((row.source, row.k / SCALE),)

    def texts(self, i: int) -> Pairs:
        row = self._rows[i - 1]
        return () if row.waited is None else ((row.waited, row.k / SCALE),)

    def readers(self, j: int) -> Pairs:
        return self._readers.get(j, ())

    def same_text(self, i: int, j: int) -> bool:
        return False


def read_run(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """report.json and the finished requests by arrival. Raises NotFoundError, InvalidInputError."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        with (folder / "requests.csv").open(newline="", encoding="utf-8") as lines:
            raw = sorted(csv.DictReader(lines), key=lambda r: float(r["arrival_s"]))
        done = [r for r in raw if r["state"] == "done" and r["claimed_s"]]
        number = {r["id"]: i for i, r in enumerate(done, 1)}
        rows = [
            Row(
                arrival_s=float(r["arrival_s"]),
                claimed_s=float(r["claimed_s"]),
                done_s=float(r["done_s"]),
                k=int(r["skipped_steps"] or 0),
                source=number.get(r["source_id"], 0) if r["source_id"] and int(r["skipped_steps"] or 0) else None,
                waited=number.get(r["waits_on"]) if r["waits_on"] else None,
                model=r.get("model") or "",
            )
            for r in done
        ]
    except OSError as error:
        raise NotFoundError(f"cannot read a run in {folder}: {error.strerror}", field="run") from error
    except (ValueError, KeyError) as error:
        raise InvalidInputError(f"{folder} does not hold a run's report: {error}", field="run") from error
    if len(rows) < 12:
        raise InvalidInputError(f"{folder} holds {len(rows)} finished requests; at least 12 are needed", field="run")
    return report, rows


def calibrate(rows: Sequence[Row], total_steps: int, workers: int) -> tuple[float, float, float]:
    """(large_s, small_s, overhead_s) from the first part of the run.

    A worker is occupied from claim to done; hits take overhead + small (1 - k/T), fitted by least squares. To the overhead
    comes the dispatch gap: from the moment that both a request and a worker were there until the claim.
    """
    misses = calibrating([r for r in rows if r.source is None], workers)
    large_model = misses[0].model if misses else ""
    # Under the published roles a large worker refines with the large model; that says nothing of the small one.
    hits = calibrating([r for r in rows if r.source is not None and not (large_model and r.model == large_model)], 0)
    busy = np.array([r.done_s - r.claimed_s for r in hits])
    share = np.array([1 - r.k / total_steps for r in hits])
    overhead, small = 0.0, 0.0
    if len(set(share.tolist())) >= 2:
        slope, intercept = np.polyfit(share, busy, 1)
        overhead, small = max(0.0, float(intercept)), max(0.0, float(slope))
    elif hits:
        small = typical(busy / share)
    large = typical([r.done_s - r.claimed_s for r in misses]) - overhead if misses else 5 * small
    ends: list[float] = []
    gaps = []
    for row in sorted(rows, key=lambda r: r.claimed_s)[: max(8, int(len(rows) * CALIBRATION))]:
        free = sorted(ends)[-workers] if len(ends) >= workers else row.arrival_s
        gaps.append(max(0.0, row.claimed_s - max(row.arrival_s, free)))
        ends.append(row.done_s)
    return max(large, 1e-3), max(small or large / 5, 1e-3), overhead + typical(gaps)


def calibrating(rows: Sequence[Row], skipped: int) -> list[Row]:
    """The first part of a class, but for its very first requests where there are enough: something may be loaded there."""
    start = skipped if len(rows) >= 2 * skipped + 4 else 0
    return list(rows[start : start + max(8, int(len(rows) * CALIBRATION))])


def typical(values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The mean without the largest twentieth: throughput follows the mean, but not a single hiccup."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return float(ordered[: max(1, int(np.ceil(len(ordered) * 0.95)))].mean())


def turnaround(rows: Sequence[Row], concurrency: int) -> float:
    """Seconds from an end to the arrival that it allowed, in a closed loop."""
    if not concurrency:
        return 0.0
    part = rows[: len(rows) // 2]
    ends = sorted(r.done_s for r in rows)
    gaps = [max(0.0, row.arrival_s - ends[i]) for i, row in enumerate(part[concurrency:])][concurrency:]
    return typical(gaps) if gaps else 0.0


def validate(folder: Path, *, total_steps: int = 50) -> dict[str, Any]:
    """Figures of both, relative errors, and ``passed``."""
    report, rows = read_run(folder)
    settings = report["settings"]
    if missing := {"workers", "mode", "arrivals", "concurrency"} - set(settings):
        raise InvalidInputError(f"{folder}: report.json lacks settings.{min(missing)}", field="run")
    workers = int(settings["workers"])
    concurrency = int(settings["concurrency"]) if settings["arrivals"] == "closed" else 0
    large_s, small_s, overhead_s = calibrate(rows, total_steps, workers)
    turnaround_s = turnaround(rows, concurrency)
    ks = sorted({r.k for r in rows if r.k > 0}) or [1]
    config = SimConfig(
        gpus=workers,
        large_s=large_s,
        small_s=small_s,
        overhead_s=overhead_s,
        turnaround_s=turnaround_s,
        ladder=Ladder(rungs=tuple(Rung(min_similarity=k / SCALE, skipped_steps=k) for k in ks)),
        policy="large-only" if report["policy"] == "large-only" else "modm",
        features=frozenset({"inflight"}) if any(r.waited for r in rows) else frozenset(),
        workers="roles" if settings["mode"] == "roles" else "pooled",
        allocation="static",
        static_large=1,
        total_steps=total_steps,
    )
    first = rows[0].arrival_s
    arrivals = [r.arrival_s - first for r in rows]
    found = Simulation(config, RecordedSimilarities(rows), arrivals, concurrency=concurrency).run().report()
    real = {"served_per_min": report["served_per_min"], "latency_p50_s": report["latency_s"]["p50"]}
    ours = {"served_per_min": found["served_per_min"], "latency_p50_s": found["latency_s"]["p50"]}
    errors = {name: round(abs(ours[name] - real[name]) / real[name], 4) for name in real}
    return {
        "run": report.get("name", report["policy"]),
        "requests": len(rows),
        "machine": report["machine"],
        "profile": {
            "large_s": round(large_s, 4),
            "small_s": round(small_s, 4),
            "overhead_s": round(overhead_s, 4),
            "turnaround_s": round(turnaround_s, 4),
        },
        "real": real | {"hit_rate": report["hit_rate"]},
        "simulated": ours | {"hit_rate": found["hit_rate"]},
        "errors": errors,
        "limits": {"served_per_min": MAX_THROUGHPUT_ERROR, "latency_p50_s": MAX_LATENCY_ERROR},
        "passed": errors["served_per_min"] <= MAX_THROUGHPUT_ERROR and errors["latency_p50_s"] <= MAX_LATENCY_ERROR,
    }
