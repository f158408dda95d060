"""Plots of simulated runs. matplotlib is imported when one is drawn."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.simulator.outcome import DONE, Outcome

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def _save(path: Path, draw: Callable[[Any], None]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=110)
    try:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        draw(axes)
        figure.tight_layout()
        figure.savefig(path, metadata={"Software": ""})
    finally:
        plt.close(figure)


def of_run(outcome: Outcome, folder: Path) -> None:
    """latency_cdf.png, throughput.png, queue.png and, with a controller, roles.png in ``folder``."""
    rows = slice(outcome.warm, None)
    done = outcome.status[rows] == DONE
    latency = np.sort((outcome.end[rows] - outcome.arrival[rows])[done])
    large_s = outcome.config.large_s
    minutes = outcome.per_minute()

    def cdf(axes: Any) -> None:
        axes.step(latency, np.arange(1, len(latency) + 1) / max(1, len(done)), where="post", color=BLUE, linewidth=2)
        for multiple in (2, 4):
            axes.axvline(multiple * large_s, color="#666666", linestyle="--", linewidth=1)
        axes.set(
            xlabel="latency from intended arrival, s (lines: 2x and 4x)", ylabel="share of all requests", ylim=(0, 1.02)
        )

    def rates(axes: Any) -> None:
        for name, colour in (("offered", ORANGE), ("served", BLUE), ("refused", RED)):
            axes.plot(
                [row["minute"] for row in minutes], _smooth([row[name] for row in minutes]), label=name, color=colour
            )
        axes.set(xlabel="minute", ylabel="per minute, mean of 5")
        axes.legend(frameon=False)

    def queued(axes: Any) -> None:
        axes.plot([row["minute"] for row in minutes], [row["queued"] for row in minutes], color=BLUE)
        axes.set(xlabel="minute", ylabel="arrived and not started")

    def roles(axes: Any) -> None:
        at = [tick["at_s"] / 60 for tick in outcome.ticks]
        axes.step(at, [tick["n_large"] for tick in outcome.ticks], where="post", color=BLUE, label="large workers")
        axes.set(xlabel="minute", ylabel="large workers", ylim=(0, outcome.config.gpus + 1))

    _save(folder / "latency_cdf.png", cdf)
    _save(folder / "throughput.png", rates)
    _save(folder / "queue.png", queued)
    if outcome.ticks:
        _save(folder / "roles.png", roles)


def _smooth(values: list[float]) -> list[float]:
    width = min(5, len(values))
    if width == 0:
        return []
    return [float(v) for v in np.convolve(np.asarray(values, dtype=float), np.ones(width) / width, mode="same")]


def over_rate(reports: Mapping[float, Mapping[str, Any]], folder: Path) -> None:
    """P99 and SLO violations over the offered rate: over_rate.csv, p99.png, violations.png."""
    rates = list(reports)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"rate_per_min": rate, "served_per_min": r["served_per_min"], "hit_rate": r["hit_rate"],
         "p99_s": r["latency_s"]["p99"], "violations_2x": r["slo"]["violations_2x"],
         "violations_4x": r["slo"]["violations_4x"], "refused": r["requests"]["refused"]}
        for rate, r in reports.items()
    ]  # fmt: skip
    with (folder / "over_rate.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    def p99(axes: Any) -> None:
        axes.plot(rates, [row["p99_s"] for row in rows], marker="o", color=BLUE)
        axes.set(xlabel="offered per minute", ylabel="P99 latency, s", ylim=(0, None))

    def violations(axes: Any) -> None:
        axes.plot(rates, [row["violations_2x"] for row in rows], marker="o", color=BLUE, label="2x")
        axes.plot(rates, [row["violations_4x"] for row in rows], marker="o", color=ORANGE, label="4x")
        axes.set(xlabel="offered per minute", ylabel="share over the SLO", ylim=(0, 1.02))
        axes.legend(frameon=False)

    _save(folder / "p99.png", p99)
    _save(folder / "violations.png", violations)
