"""The figures of a run, from the records of its requests. Pure.

Latency counts from the intended arrival; refused, failed and lost requests count as SLO violations, so neither coordinated
omission nor shedding flatters a system (facts D6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modm_tasks.messages import RequestRecord, Route, State

SCHEMA_VERSION = 1


def distribution(values: Sequence[float]) -> dict[str, float | None]:
    """mean, p50, p95, p99 (linear interpolation, as numpy's percentile); None without values."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    array = np.asarray(values)
    p50, p95, p99 = np.percentile(array, [50, 95, 99])
    rounded = {"mean": float(array.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}
    return {k: round(v, 4) for k, v in rounded.items()}


def is_hit(record: RequestRecord) -> bool:
    """Served from a cached image: refined, or answered with it."""
    return record.decision is not None and record.decision.source_id is not None


def _refined(record: RequestRecord) -> bool:
    """Drawn from a source: neither a stored answer nor one that was drawn anew because its refinement was poor."""
    stored = record.decision is not None and record.decision.route is Route.STORED
    escalated = record.completion is not None and record.completion.escalated
    return is_hit(record) and not stored and not escalated


def build_report(
    records: Sequence[RequestRecord],
    *,
    policy: str,
    refused: int = 0,
    lost: int = 0,
    large_latency_s: float | None = None,
    role_moves: Sequence[Mapping[str, Any]] = (),
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    name: str = "",
    interrupted: bool = False,
) -> dict[str, Any]:
    """The content of report.json. ``large_latency_s`` None = the mean drawing time of this run's large images."""
    done = [r for r in records if r.state is State.DONE]
    routed = [r for r in records if r.decision is not None]
    latencies = [r.latency_s for r in done if r.latency_s is not None]
    waits = [r.queue_wait_s for r in done if r.queue_wait_s is not None]
    unit_s = large_latency_s or _large_latency(done)
    count = Counter(r.state for r in records)
    failed = count[State.FAILED] + refused + count[State.REFUSED] + lost
    judged = len(done) + failed
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name or policy,
        "policy": policy,
        "interrupted": interrupted,
        "requests": {
            "submitted": len(records) + refused,
            "done": len(done),
            "failed": count[State.FAILED],
            "refused": refused + count[State.REFUSED],
            "cancelled": count[State.CANCELLED],
            "lost": lost,
        },
        "hit_rate": round(sum(map(is_hit, routed)) / len(routed), 4) if routed else None,
        "skipped_steps": _skipped(routed),
        "served_per_min": served_per_min(done),
        "latency_s": distribution(latencies),
        "queue_wait_s": distribution(waits),
        "slo": {
            "large_latency_s": None if unit_s is None else round(unit_s, 4),
            "violations_2x": _violations(latencies, failed, judged, unit_s, 2.0),
            "violations_4x": _violations(latencies, failed, judged, unit_s, 4.0),
        },
        "clip_score": _clip(done),
        "refined_by": dict(Counter(r.completion.model for r in done if r.completion is not None and _refined(r))),
        "role_moves": len(role_moves),
        "moves": [dict(m) for m in role_moves],
        "first_arrival_s": min((r.arrival_s for r in records), default=None),
        "similarity": _similarity(routed),
        "prediction": _prediction(routed),
        "depth": dict(sorted(Counter(str(r.completion.depth) for r in done if r.completion).items())),
        "per_minute": per_minute(records),
        "machine": dict(machine),
        "settings": dict(settings),
    }


def served_per_min(done: Sequence[RequestRecord]) -> float | None:
    """done / (last completion - first arrival), per minute."""
    ends = [r.done_s for r in done if r.done_s is not None]
    if not ends:
        return None
    span_s = max(ends) - min(r.arrival_s for r in done)
    return round(60 * len(done) / span_s, 3) if span_s > 0 else None


def _large_latency(done: Sequence[RequestRecord]) -> float | None:
    times = [
        r.completion.gpu_s
        for r in done
        if r.completion is not None and not is_hit(r) and r.decision is not None and r.decision.route is Route.LARGE_GEN
    ]
    return float(np.median(times)) if times else None


def _skipped(routed: Sequence[RequestRecord]) -> dict[str, int]:
    ks = Counter(r.decision.skipped_steps if is_hit(r) and r.decision else 0 for r in routed)
    return {str(k): ks[k] for k in sorted(ks)}


def _violations(
    latencies: Sequence[float], failed: int, judged: int, unit_s: float | None, multiple: float
) -> float | None:
    if not judged or unit_s is None:
        return None
    late = sum(1 for latency in latencies if latency > multiple * unit_s)
    return round((late + failed) / judged, 4)


def _clip(done: Sequence[RequestRecord]) -> dict[str, Any]:
    scores: dict[str, list[float]] = {route.value: [] for route in Route}
    for record in done:
        if record.clip_score is not None and record.decision is not None:
            scores[record.decision.route.value].append(record.clip_score)
    everything = [s for group in scores.values() for s in group]
    by_route = {route: round(float(np.mean(group)), 4) for route, group in scores.items() if group}
    return {"mean": round(float(np.mean(everything)), 4) if everything else None, "by_route": by_route}


def _similarity(routed: Sequence[RequestRecord]) -> dict[str, float | None]:
    values = [r.decision.similarity for r in routed if r.decision and r.decision.similarity is not None and is_hit(r)]
    return distribution(values)


def _prediction(routed: Sequence[RequestRecord]) -> dict[str, Any]:
    """Of requests that waited on an unfinished source: predicted against true similarity, and how many became hits.

    The true one is of the best image at the end of the wait, which may be another than the one that was waited on.
    """
    waited = [r for r in routed if r.decision and r.decision.predicted_similarity is not None]
    missed = [
        r.decision.similarity - r.decision.predicted_similarity
        for r in waited
        if r.decision and r.decision.similarity is not None and r.decision.predicted_similarity is not None
    ]
    return {
        "waited": len(waited),
        "became_hits": sum(map(is_hit, waited)),
        "bias": round(float(np.mean(missed)), 4) if missed else None,
        "error": round(float(np.sqrt(np.mean(np.square(missed)))), 4) if missed else None,
    }


def per_minute(records: Sequence[RequestRecord], *, bins: int = 60) -> list[dict[str, Any]]:
    """Series over the run: one row a minute, or finer where the run is short (at most ``bins`` rows)."""
    ended = [r for r in records if r.done_s is not None]
    if not ended:
        return []
    start = min(r.arrival_s for r in records)
    end = max(r.done_s or 0.0 for r in ended)
    span_s = max(end - start, 1.0)
    # A short run in twelve parts: finer ones hold so few requests that the series is noise.
    count = min(bins, max(1, round(span_s / 60.0 if span_s > 12 * 60 else min(12.0, span_s))))
    width_s = span_s / count
    rows = []
    for index in range(count):
        low, high = start + index * width_s, start + (index + 1) * width_s
        if index == count - 1:
            high = max(high, end) + 1e-6  # the last completion belongs to the last part
        arrived = [r for r in records if low <= r.arrival_s < high]
        done = [r for r in ended if r.state is State.DONE and low <= (r.done_s or 0.0) < high]
        routed = [r for r in arrived if r.decision is not None]
        hits = [r for r in routed if is_hit(r)]
        waiting = [r for r in records if r.arrival_s < high and (r.claimed_s is None or r.claimed_s >= high)]
        rows.append(
            {
                "at_s": round(low - start, 3),
                "width_s": round(width_s, 3),
                "arrivals": len(arrived),
                "done": len(done),
                "served_per_min": round(60 * len(done) / width_s, 3),
                "hit_rate": round(len(hits) / len(routed), 4) if routed else None,
                "mean_skipped": _mean([r.decision.skipped_steps for r in hits if r.decision]),
                "queue": len([r for r in waiting if r.done_s is None or r.done_s >= high]),
                "latency_p50_s": _mean_or_p50([r.latency_s for r in done if r.latency_s is not None]),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 3) if values else None


def _mean_or_p50(values: Sequence[float]) -> float | None:
    return round(float(np.median(values)), 4) if values else None


def comparison(large_only: Mapping[str, Any], modm: Mapping[str, Any]) -> dict[str, Any]:
    """Two reports of the same trace and run side by side; ``speedup`` is MoDM over large-only."""
    base, ours = large_only["served_per_min"], modm["served_per_min"]
    scores = large_only["clip_score"]["mean"], modm["clip_score"]["mean"]
    return {
        "schema_version": SCHEMA_VERSION,
        "speedup": round(ours / base, 3) if base and ours else None,
        "clip_score_ratio": round(scores[1] / scores[0], 4) if scores[0] and scores[1] else None,
        "lost": large_only["requests"]["lost"] + modm["requests"]["lost"],
        "large_only": {k: large_only[k] for k in ("served_per_min", "latency_s", "clip_score", "requests")},
        "modm": {
            k: modm[k]
            for k in (
                "served_per_min",
                "latency_s",
                "clip_score",
                "requests",
                "hit_rate",
                "skipped_steps",
                "refined_by",
            )
        },
    }
