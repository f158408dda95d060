"""Reports side by side on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _f(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _pct(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _dist(values: Mapping[str, float | None]) -> str:
    return " / ".join(_f(values[k]) for k in ("p50", "p95", "p99"))


def rows(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row per figure: its name, then a cell per report."""
    requests = [r["requests"] for r in reports]
    skipped = [", ".join(f"{k}: {n}" for k, n in r["skipped_steps"].items() if k != "0") or "none" for r in reports]
    table: list[tuple[str, list[str]]] = [
        ("served per minute", [_f(r["served_per_min"]) for r in reports]),
        ("latency p50 / p95 / p99, s", [_dist(r["latency_s"]) for r in reports]),
        ("queue wait p50 / p95 / p99, s", [_dist(r["queue_wait_s"]) for r in reports]),
        ("hit rate", [_pct(r["hit_rate"]) for r in reports]),
        ("skipped steps (k: hits)", skipped),
        ("mean CLIP score", [_f(r["clip_score"]["mean"], ".3f") for r in reports]),
        ("over 2x / 4x SLO", [f"{_pct(r['slo']['violations_2x'])} / {_pct(r['slo']['violations_4x'])}" for r in reports]),
        ("refined by", [", ".join(f"{m}: {n}" for m, n in r["refined_by"].items()) or "-" for r in reports]),
        ("role moves", [str(r["role_moves"]) for r in reports]),
        ("done / failed / refused / lost",
         [f"{q['done']} / {q['failed']} / {q['refused']} / {q['lost']}" for q in requests]),
    ]  # fmt: skip
    return [[name, *cells] for name, cells in table]


def names(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(r.get("name") or r["policy"]) for r in reports]
