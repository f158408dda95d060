"""What came out of a run: one row for each request, and the report of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modm_tasks.messages import Decision, Route
from orchestrator.simulator.config import SimConfig

if TYPE_CHECKING:
    from orchestrator.simulator.engine import Simulation

PENDING, DONE, REFUSED = 0, 1, 2


class Outcome:
    """Arrays by row of the source; rows before ``warm`` are the warm cache and are not counted."""

    def __init__(self, config: SimConfig, arrivals_s: Sequence[float], warm: int) -> None:
        n = warm + len(arrivals_s)
        self.config, self.warm = config, warm
        self.arrival = np.concatenate([np.zeros(warm), np.asarray(arrivals_s, dtype=np.float64)])
        self.start = np.full(n, np.nan)
        self.end = np.full(n, np.nan)
        self.k = np.full(n, -1, dtype=np.int16)
        self.status = np.zeros(n, dtype=np.int8)
        self.large = np.zeros(n, dtype=bool)
        self.is_stored = np.zeros(n, dtype=bool)
        self.worker = np.full(n, -1, dtype=np.int32)
        self.waited = np.zeros(n, dtype=bool)
        self.rebound = np.zeros(n, dtype=bool)
        self.escalated = np.zeros(n, dtype=bool)
        self.retry_s = np.zeros(n)
        self.tired = 0
        self.role_moves = 0
        self.ticks: list[dict[str, Any]] = []

    # --- written by the simulation ------------------------------------------------------------------------------

    def started(self, row: int, now_s: float, decision: Decision, *, large: bool) -> None:
        self.start[row] = now_s
        self.large[row] = large
        self.k[row] = decision.skipped_steps if decision.source_id is not None else -1
        if decision.route is Route.SMALL_REFINE and decision.source_id is None:
            self.k[row] = -1

    def finished(self, row: int, now_s: float) -> None:
        self.end[row] = now_s
        self.status[row] = DONE

    def stored(self, row: int, now_s: float, decision: Decision) -> None:
        assert decision.route is Route.STORED
        self.start[row] = self.end[row] = now_s
        self.is_stored[row] = True
        self.status[row] = DONE

    def refused(self, row: int, now_s: float, retry_s: float) -> None:
        self.end[row] = now_s
        self.retry_s[row] = retry_s
        self.status[row] = REFUSED

    def close(self, simulation: Simulation) -> None:
        if simulation.controller is not None:
            self.role_moves = simulation.controller.moves
            self.ticks = simulation.controller.history

    # --- read by reports ----------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The keys of ``report.json``. Refused requests count as SLO violations, and so do lost ones."""
        c, rows = self.config, slice(self.warm, None)
        status, arrival, end = self.status[rows], self.arrival[rows], self.end[rows]
        done = status == DONE
        submitted, n_done = len(status), int(done.sum())
        latency = (end - arrival)[done]
        wait = (self.start[rows] - arrival)[done]
        span_s = float(end[done].max() - arrival.min()) if n_done else 0.0
        k = self.k[rows][done]
        hits = (k >= 0) | self.is_stored[rows][done]
        models = Counter("large" if big else "small" for big in self.large[rows][done & (self.k[rows] >= 0)])
        late2, late4 = (int((latency > m * c.large_s).sum()) + submitted - n_done for m in (2, 4))
        in_time = int((latency <= c.slo_s).sum())
        return {
            "policy": c.policy,
            "features": sorted(c.features),
            "simulated": True,
            "requests": {
                "submitted": submitted, "done": n_done, "failed": 0, "refused": int((status == REFUSED).sum()),
                "cancelled": 0, "lost": int((status == 0).sum()),
            },
            "hit_rate": round(float(hits.mean()), 4) if n_done else None,
            "skipped_steps": {str(int(v)): int(n) for v, n in zip(*np.unique(k[k >= 0], return_counts=True), strict=True)},
            "served_per_min": round(n_done / span_s * 60, 4) if span_s > 0 else None,
            "latency_s": _spread(latency),
            "queue_wait_s": _spread(wait),
            "slo": {
                "large_latency_s": c.large_s,
                "violations_2x": round(late2 / submitted, 4),
                "violations_4x": round(late4 / submitted, 4),
                "goodput_per_min": round(in_time / span_s * 60, 4) if span_s > 0 else None,
            },
            "refined_by": dict(models),
            "role_moves": self.role_moves,
            "degraded_time": round(sum(t["degradation"] > 0 for t in self.ticks) / max(1, len(self.ticks)), 4),
            "waited": int(self.waited[rows].sum()),
            "gave_up_waiting": self.tired,
            "rebound": int(self.rebound[rows].sum()),
            "escalated": int(self.escalated[rows].sum()),
            "machine": {"gpus": c.gpus, "large_s": c.large_s, "small_s": c.small_s, "modelled": True},
            "settings": {
                "workers": c.workers, "allocation": None if c.workers == "pooled" else c.allocation, "variant": c.variant,
                "period_s": c.period_s, "cache_capacity": c.cache_capacity, "cache_admission": c.cache_admission,
                "ladder": {str(r.min_similarity): r.skipped_steps for r in c.ladder.rungs},
                "slo_multiple": c.slo_multiple, "admit": c.admit, "degrade": c.degrade, "seed": c.seed,
            },
        }  # fmt: skip

    def per_minute(self) -> list[dict[str, float]]:
        """One row a minute: offered, served, refused, queued (arrived and not started at its end), hit rate of the done."""
        rows = slice(self.warm, None)
        arrival, start, end = self.arrival[rows], self.start[rows], self.end[rows]
        done, refused = self.status[rows] == DONE, self.status[rows] == REFUSED
        hits = (self.k[rows] >= 0) | self.is_stored[rows]
        last = int(np.nanmax(end) // 60) if len(end) else 0
        edges = np.arange(last + 2) * 60.0
        offered, _ = np.histogram(arrival, edges)
        served, _ = np.histogram(end[done], edges)
        served_hits, _ = np.histogram(end[done & hits], edges)
        turned, _ = np.histogram(end[refused], edges)
        come, gone = np.sort(arrival[done]), np.sort(start[done])
        queued = np.searchsorted(come, edges[1:]) - np.searchsorted(gone, edges[1:])
        return [
            {"minute": i, "offered": int(offered[i]), "served": int(served[i]), "refused": int(turned[i]),
             "queued": int(queued[i]), "hit_rate": round(float(served_hits[i] / served[i]), 4) if served[i] else 0.0}
            for i in range(last + 1)
        ]  # fmt: skip

    def per_request(self) -> list[dict[str, Any]]:
        """One row a request, in order of arrival. Times in seconds from the start; empty where there is none."""
        names = {PENDING: "lost", DONE: "done", REFUSED: "refused"}
        out = []
        for row in range(self.warm, len(self.arrival)):
            route = "stored" if self.is_stored[row] else "small-refine" if self.k[row] >= 0 else "large-gen"
            out.append(
                {"request": row - self.warm, "state": names[int(self.status[row])], "route": route,
                 "skipped_steps": max(0, int(self.k[row])), "arrival_s": round(float(self.arrival[row]), 3),
                 "start_s": _time(self.start[row]), "done_s": _time(self.end[row]), "worker": int(self.worker[row]),
                 "waited": bool(self.waited[row]), "rebound": bool(self.rebound[row]),
                 "escalated": bool(self.escalated[row])}
            )  # fmt: skip
        return out


def _time(value: float) -> float | str:
    return "" if np.isnan(value) else round(float(value), 3)


def _spread(values: NDArray[np.float64]) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "p50": None, "p95": None, "p99": None}
    p50, p95, p99 = (round(float(v), 3) for v in np.percentile(values, [50, 95, 99]))
    return {"mean": round(float(values.mean()), 3), "p50": p50, "p95": p95, "p99": p99}
