"""Plots of one or several reports, as PNG bytes. Colours are Okabe and Ito's, told apart by colour-blind readers too."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
#: Beside the colours, for print and for readers who see none.
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1)), "-.", (0, (6, 1, 1, 1, 1, 1)), ":")
#: Above the axes, where no curve can be.
LEGEND: dict[str, Any] = {
    "frameon": False, "ncols": 3, "loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2,
}  # fmt: skip
Report = Mapping[str, Any]


def figure(draw: Callable[[Any], None], *, width: float = 6.4, height: float = 3.6) -> bytes:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(figsize=(width, height), dpi=110)
    try:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        draw(axes)
        drawing.tight_layout()
        out = io.BytesIO()
        drawing.savefig(out, format="png", metadata={"Software": ""})
        return out.getvalue()
    finally:
        plt.close(drawing)


def _legend(axes: Any) -> None:
    """None where nothing was drawn: a run of which every request was refused still has its page."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**LEGEND)


def _name(report: Report) -> str:
    return str(report.get("name") or report["policy"])


def latency_cdf(latencies: Mapping[str, Sequence[float]], slo_s: float | None = None) -> bytes:
    """Share of requests that were done within so many seconds of their intended arrival."""

    def draw(axes: Any) -> None:
        for (name, values), colour, dash in zip(latencies.items(), COLOURS, DASHES, strict=False):
            ordered = sorted(values)
            if ordered:
                shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
                axes.step(ordered, shares, where="post", label=name, color=colour, linestyle=dash, linewidth=2)
        if slo_s:
            axes.axvline(slo_s, color="#666666", linestyle="--", linewidth=1, label="2x SLO")
        axes.set(xlabel="latency from intended arrival, s", ylabel="share of requests", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        _legend(axes)

    return figure(draw)


def throughput_bars(reports: Sequence[Report]) -> bytes:
    """Served per minute, with the ratio to the first report."""

    def draw(axes: Any) -> None:
        values = [r["served_per_min"] or 0.0 for r in reports]
        bars = axes.bar([_name(r) for r in reports], values, color=COLOURS[: len(reports)], width=0.6)
        for bar, value in zip(bars, values, strict=True):
            ratio = f"  ({value / values[0]:.2f}x)" if values[0] and value != values[0] else ""
            axes.annotate(
                f"{value:.1f}{ratio}", (bar.get_x() + bar.get_width() / 2, value), ha="center", va="bottom", fontsize=9
            )
        axes.set(ylabel="images per minute")
        axes.margins(y=0.15)

    return figure(draw, width=1.6 + 1.6 * len(reports))


def over_time(reports: Sequence[Report], field: str, label: str) -> bytes:
    """One column of the per-minute series over the run."""

    def draw(axes: Any) -> None:
        for report, colour, dash in zip(reports, COLOURS, DASHES, strict=False):
            points = [(row["at_s"] / 60, row[field]) for row in report["per_minute"] if row.get(field) is not None]
            if points:
                style = {"color": colour, "linestyle": dash, "linewidth": 2, "marker": "."}
                axes.plot(*zip(*points, strict=True), label=_name(report), **style)
        axes.set(xlabel="minutes since the first arrival", ylabel=label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        _legend(axes)

    return figure(draw)


def skipped_steps(reports: Sequence[Report]) -> bytes:
    """How many requests skipped how many of the steps (0 = drawn from nothing)."""

    def draw(axes: Any) -> None:
        ks = sorted({int(k) for r in reports for k in r["skipped_steps"]})
        width = 0.8 / max(1, len(reports))
        for index, (report, colour) in enumerate(zip(reports, COLOURS, strict=False)):
            at = [i + index * width - 0.4 + width / 2 for i in range(len(ks))]
            counts = [report["skipped_steps"].get(str(k), 0) for k in ks]
            axes.bar(at, counts, width=width, color=colour, label=_name(report))
        axes.set_xticks(range(len(ks)), [str(k) for k in ks])
        axes.set(xlabel="skipped steps k", ylabel="requests")
        _legend(axes)

    return figure(draw)


def role_timeline(report: Report) -> bytes | None:
    """Which worker had which role when; None without moves."""
    moves = sorted(report.get("moves", ()), key=lambda m: m["at_s"])
    if not moves:
        return None
    start = min(moves[0]["at_s"], report.get("first_arrival_s") or moves[0]["at_s"])
    end = max(moves[-1]["at_s"] - start, report["per_minute"][-1]["at_s"] if report["per_minute"] else 0.0) + 1.0
    workers = sorted({m["worker"] for m in moves})
    colour = {"large": COLOURS[0], "small": COLOURS[1]}

    def draw(axes: Any) -> None:
        for row, worker in enumerate(workers):
            own = [m for m in moves if m["worker"] == worker]
            edges = [0.0, *(m["at_s"] - start for m in own), end]
            roles = [own[0].get("old"), *(m.get("new") for m in own)]
            for low, high, role in zip(edges, edges[1:], roles, strict=False):
                if role in colour:
                    axes.barh(row, high - low, left=low, color=colour[role], height=0.6)
        axes.set_yticks(range(len(workers)), [w.split("@")[0] for w in workers])
        axes.set(xlabel="seconds since the first arrival (workers that moved)")
        axes.grid(visible=False)
        axes.legend(
            handles=[_patch(c, r) for r, c in colour.items()], frameon=False, ncols=2, loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
        )  # fmt: skip

    return figure(draw, height=1.4 + 0.4 * len(workers))


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def all_plots(reports: Sequence[Report], latencies: Mapping[str, Sequence[float]]) -> dict[str, bytes]:
    """Title -> PNG, in the order in which they should be read."""
    slo = next((r["slo"]["large_latency_s"] for r in reports if r["slo"]["large_latency_s"]), None)
    plots = {
        "Throughput": throughput_bars(reports),
        "Latency": latency_cdf(latencies, None if slo is None else 2 * slo),
        "Skipped steps": skipped_steps(reports),
        "Throughput over time": over_time(reports, "served_per_min", "images per minute"),
        "Hit rate over time": over_time(reports, "hit_rate", "hit rate"),
        "Skipped steps over time": over_time(reports, "mean_skipped", "mean skipped steps of hits"),
        "Unstarted requests over time": over_time(reports, "queue", "requests waiting"),
    }
    for report in reports:
        timeline = role_timeline(report)
        if timeline is not None:
            plots[f"Roles over time: {_name(report)}"] = timeline
    return plots
