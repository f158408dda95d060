"""The simulator against a run of the real stack: same arrivals, same similarities, times of a profile of this machine.

From the run's report folder come each request's arrival, and what its prompt and its image resemble: the vectors of
`vectors.npz`, which `modm bench validate` writes there, else the source and k that the real router found. All times are
those of the profile, which was measured with other requests. Whether a source is finished when it is looked for, queues,
waits, moves of roles and the closed loop are the simulator's own. Without vectors, a request whose source is not finished
yet is a miss here, where the real router might have found a lesser source.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from modm_tasks.errors import InvalidInputError, NotFoundError
from orchestrator.decisions.ladder import Ladder, Rung
from orchestrator.device_profiles import DeviceProfile
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.engine import Simulation
from orchestrator.simulator.similarity import Pairs, Similarities, VectorSimilarities

MAX_THROUGHPUT_ERROR, MAX_LATENCY_ERROR = 0.10, 0.15
#: Recorded decisions carry k, not the ladder: rung k stands at the made-up similarity k / SCALE.
SCALE = 1000.0
#: Times of the profile, as they stand in the result.
TIMES = (
    "large_s", "small_s", "large_fixed_s", "small_fixed_s", "overhead_s", "front_s", "claim_s", "gap_s", "alone_share",
    "turnaround_s",
)  # fmt: skip


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
    id: str = ""


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
                id=r["id"],
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


def vectors_of(folder: Path, rows: Sequence[Row]) -> tuple[VectorSimilarities, Ladder] | None:
    """The run's similarities and its ladder from vectors.npz; None without that file. Raises InvalidInputError."""
    path = folder / "vectors.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as found:
            place = {str(name): i for i, name in enumerate(found["ids"])}
            order = [place[row.id] for row in rows]
            rungs = [Rung(min_similarity=float(s), skipped_steps=int(k)) for s, k in found["ladder"]]
            warm = found["warm"]
            text, image = (np.concatenate([warm, found[name][order]]) for name in ("text", "image"))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInputError(f"{path} does not hold the run's vectors: {error}", field="run") from error
    ladder = Ladder(rungs=tuple(rungs))
    return VectorSimilarities(text, warm=len(warm), threshold=ladder.threshold, image=image), ladder


def turnaround(rows: Sequence[Row], concurrency: int) -> float:
    """Median seconds from an end to the arrival that it allowed, in a closed loop: the users' own time."""
    ends = sorted(r.done_s for r in rows)
    gaps = [max(0.0, row.arrival_s - ends[i]) for i, row in enumerate(rows[concurrency:])]
    return median(gaps) if concurrency and gaps else 0.0


def config_of(report: Mapping[str, Any], rows: Sequence[Row], profile: DeviceProfile) -> tuple[SimConfig, int]:
    """The simulated system and its concurrency (0 = open loop). Raises InvalidInputError: the report or profile lacks it."""
    settings = report["settings"]
    needed = {"workers", "mode", "models", "arrivals", "concurrency"}
    if missing := needed - set(settings):
        raise InvalidInputError(f"report.json lacks settings.{min(missing)}", field="run")
    concurrency = int(settings["concurrency"]) if settings["arrivals"] == "closed" else 0
    ks = sorted({r.k for r in rows if r.k > 0}) or [1]
    large, small = settings["models"]["large"], settings["models"]["small"]
    return (
        SimConfig(
            gpus=int(settings["workers"]),
            large_s=profile.image_s(large),
            small_s=profile.image_s(small),
            large_fixed_s=profile.fixed_s(large),
            small_fixed_s=profile.fixed_s(small),
            large_spread=profile.models[large].spread,
            small_spread=profile.models[small].spread,
            overhead_s=profile.overhead_s,
            front_s=profile.front_s,
            claim_s=profile.claim_s,
            gap_s=profile.gap_s,
            alone_share=profile.alone_share,
            turnaround_s=turnaround(rows, concurrency),
            ladder=Ladder(rungs=tuple(Rung(min_similarity=k / SCALE, skipped_steps=k) for k in ks)),
            policy="large-only" if report["policy"] == "large-only" else "modm",
            features=frozenset({"inflight"}) if any(r.waited for r in rows) else frozenset(),
            workers="roles" if settings["mode"] == "roles" else "pooled-roles",
            allocation=settings.get("allocation") or "slo",
            period_s=float(settings.get("period_s") or 180.0),
            window_s=float(settings.get("window_s") or 180.0),
            bucket_s=float(settings.get("bucket_s") or 10.0),
            total_steps=profile.total_steps,
        ),
        concurrency,
    )


def compare(folder: Path, profile: DeviceProfile) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(figures of both, relative errors and ``passed``; latencies of both). Raises NotFoundError, InvalidInputError."""
    report, rows = read_run(folder)
    config, concurrency = config_of(report, rows, profile)
    first = rows[0].arrival_s
    source: Similarities = RecordedSimilarities(rows)
    if (known := vectors_of(folder, rows)) is not None:
        source, config = known[0], replace(config, ladder=known[1])
    outcome = Simulation(config, source, [r.arrival_s - first for r in rows], concurrency=concurrency).run()
    found = outcome.report()
    real = {"served_per_min": report["served_per_min"], "latency_p50_s": report["latency_s"]["p50"]}
    ours = {"served_per_min": found["served_per_min"], "latency_p50_s": found["latency_s"]["p50"]}
    errors = {name: round(abs(ours[name] - real[name]) / real[name], 4) for name in real}
    result = {
        "run": report.get("name", report["policy"]),
        "requests": len(rows),
        "machine": report["machine"],
        "settings": {
            name: report["settings"].get(name)
            for name in ("arrivals", "rate_per_min", "concurrency", "workers", "mode", "allocation", "models")
        }
        | {"policy": report["policy"]},
        "profile": {name: getattr(config, name) for name in TIMES},
        "real": real
        | {name: report[name] for name in ("hit_rate", "role_moves")}
        | {"p99_s": report["latency_s"]["p99"]},
        "simulated": ours
        | {name: found[name] for name in ("hit_rate", "role_moves")}
        | {"p99_s": found["latency_s"]["p99"]},
        "errors": errors,
        "limits": {"served_per_min": MAX_THROUGHPUT_ERROR, "latency_p50_s": MAX_LATENCY_ERROR},
        "passed": errors["served_per_min"] <= MAX_THROUGHPUT_ERROR and errors["latency_p50_s"] <= MAX_LATENCY_ERROR,
    }
    rows_done = slice(outcome.warm, None)
    latencies = {
        "real": [r.done_s - r.arrival_s for r in rows],
        "simulated": [float(v) for v in (outcome.end - outcome.arrival)[rows_done] if not np.isnan(v)],
    }
    return result, latencies
