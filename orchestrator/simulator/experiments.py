"""The experiments of the reference, simulated: throughput, SLO over rate, rising, fluctuating, and sweeps over policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.outcome import Outcome
from orchestrator.simulator.run import Load, simulate
from orchestrator.simulator.similarity import Similarities


@dataclass(frozen=True, kw_only=True)
class System:
    """One column of a comparison: what differs from the common configuration."""

    name: str
    change: dict[str, Any]


#: Published roles for the paper's policies; `slo` has pooled roles, its default where both models are resident, and its
#: overload control; also without the latter, and with the published roles. All have the published router but the last, which
#: adds our mechanisms.
SYSTEMS = (
    System(name="modm-quality", change={"workers": "roles", "allocation": "modm-quality"}),
    System(name="modm-throughput", change={"workers": "roles", "allocation": "modm-throughput"}),
    System(name="slo", change={"workers": "pooled-roles", "allocation": "slo", "degrade": True}),
    System(name="slo, quality never lowered", change={"workers": "pooled-roles", "allocation": "slo"}),
    System(name="slo, published roles", change={"workers": "roles", "allocation": "slo"}),
    System(
        name="slo + in-flight, late binding",
        change={
            "workers": "pooled-roles",
            "allocation": "slo",
            "degrade": True,
            "features": frozenset({"inflight", "late-binding"}),
        },
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One table of docs/policies.md. ``rates`` per minute, as in the paper's sweeps (B5)."""

    name: str
    profile: str
    gpus: int
    small: str
    rates: tuple[float, ...]


A40, MI210 = (4.0, 6.0, 8.0, 10.0), (6.0, 10.0, 14.0, 18.0, 22.0, 26.0)
CLUSTERS = (
    Cluster(name="4 x A40, SD3.5-L and SDXL", profile="a40", gpus=4, small="sdxl", rates=A40),
    Cluster(name="4 x A40, SD3.5-L and SANA", profile="a40", gpus=4, small="sana", rates=A40),
    Cluster(name="16 x MI210, SD3.5-L and SDXL", profile="mi210", gpus=16, small="sdxl", rates=MI210),
    Cluster(name="16 x MI210, SD3.5-L and SANA", profile="mi210", gpus=16, small="sana", rates=MI210),
)
#: At most this share of a published policy's violations is allowed to `slo` where those exceed the other share.
HALF, EXCEEDS = 0.5, 0.10


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Means over seeds of one system at one rate. Fractions of the offered requests; rates per minute."""

    system: str
    rate_per_min: float
    violations_2x: float
    violations_4x: float
    refused: float
    goodput_per_min: float
    served_per_min: float
    hit_rate: float
    p99_s: float
    role_moves: float
    degraded: float


def sweep(
    base: SimConfig,
    source: Similarities,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    systems: Sequence[System] = SYSTEMS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """Every system at every rate with every seed of the Poisson arrivals."""
    cells = []
    for rate in rates:
        for system in systems:
            config = replace(base, **system.change)
            progress(f"{rate:g}/min {system.name}")
            found = [
                simulate(config, source, Load(kind="poisson", rate_per_min=rate, seed=seed)).report() for seed in seeds
            ]
            cells.append(_cell(system.name, rate, found))
    return cells


def _cell(name: str, rate: float, found: Sequence[dict[str, Any]]) -> Cell:
    def mean(pick: Callable[[dict[str, Any]], float | None]) -> float:
        return round(fmean(pick(r) or 0.0 for r in found), 4)

    return Cell(
        system=name,
        rate_per_min=rate,
        violations_2x=mean(lambda r: r["slo"]["violations_2x"]),
        violations_4x=mean(lambda r: r["slo"]["violations_4x"]),
        refused=mean(lambda r: r["requests"]["refused"] / r["requests"]["submitted"]),
        goodput_per_min=mean(lambda r: r["slo"]["goodput_per_min"]),
        served_per_min=mean(lambda r: r["served_per_min"]),
        hit_rate=mean(lambda r: r["hit_rate"]),
        p99_s=mean(lambda r: r["latency_s"]["p99"]),
        role_moves=mean(lambda r: r["role_moves"]),
        degraded=mean(lambda r: r["degraded_time"]),
    )


def missed_bars(cells: Sequence[Cell], *, ours: str = "slo") -> list[str]:
    """Where `slo` has more 2x violations than a published policy, or more than half of those that exceed 10 %."""
    missed = []
    for rate in dict.fromkeys(c.rate_per_min for c in cells):
        found = {c.system: c.violations_2x for c in cells if c.rate_per_min == rate}
        for name in ("modm-quality", "modm-throughput"):
            allowed = found[name] * (HALF if found[name] > EXCEEDS else 1.0)
            if found[ours] > allowed:
                missed.append(f"{rate:g}/min: {ours} {found[ours]:.1%}, {name} {found[name]:.1%}")
    return missed


def table(cells: Iterable[Cell]) -> str:
    """Markdown: a row for each rate and system. ``degraded``: share of the time with quality lowered."""
    columns = (
        "offered /min", "system", "over 2x SLO", "over 4x", "refused", "within SLO /min", "served /min", "hit rate", "P99 s",
        "degraded",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += [
        f"| {c.rate_per_min:g} | {c.system} | {c.violations_2x:.1%} | {c.violations_4x:.1%} | {c.refused:.1%} "
        f"| {c.goodput_per_min:.2f} | {c.served_per_min:.2f} | {c.hit_rate:.2f} | {c.p99_s:.0f} | {c.degraded:.0%} |"
        for c in cells
    ]
    return "\n".join(lines)


#: One at a time, then all; see docs/policies.md.
MECHANISMS = ("inflight", "late-binding", "repeats", "verify", "deadline", "drift")


def ablation(base: SimConfig, source: Similarities, load: Load) -> list[tuple[str, dict[str, Any]]]:
    """(name, report) of large-only, the published algorithm, each mechanism by itself, all but the one that buys
    quality with time, and all."""
    runs: list[tuple[str, SimConfig]] = [
        ("large-only", replace(base, policy="large-only", features=frozenset())),
        ("modm", replace(base, features=frozenset())),
    ]
    runs += [(f"modm + {name}", replace(base, features=frozenset({name}))) for name in MECHANISMS]
    runs.append(("all but verify", replace(base, policy="modm-plus", features=frozenset(MECHANISMS) - {"verify"})))
    runs.append(("modm-plus (all)", replace(base, policy="modm-plus", features=frozenset(MECHANISMS))))
    return [(name, simulate(config, source, load).report()) for name, config in runs]


def ablation_table(rows: Iterable[tuple[str, dict[str, Any]]], bound_per_min: float) -> str:
    """Markdown."""
    lines = [
        "| system | hit rate | served /min | of the fluid bound | over 2x SLO | P99 s |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in rows:
        lines.append(
            f"| {name} | {r['hit_rate']:.2f} | {r['served_per_min']:.2f} | {r['served_per_min'] / bound_per_min:.2f} "
            f"| {r['slo']['violations_2x']:.1%} | {r['latency_s']['p99']:.0f} |"
        )
    return "\n".join(lines)


def fluid_bound_per_min(base: SimConfig, source: Similarities) -> float:
    """GPUs over the mean service time if every request took the best rung that any earlier request offers (issue's form)."""
    total = 0.0
    for row in range(source.warm, source.n):
        best = max((s for j, s in source.images(row) if j < row), default=0.0)
        rung = base.ladder.lookup(best)
        total += base.large_s if rung is None else base.small_s * (1 - rung.skipped_steps / base.total_steps)
    return base.gpus * 60 * (source.n - source.warm) / total


def one(base: SimConfig, source: Similarities, load: Load, experiment: str) -> Outcome:
    """One of the reference's experiments: `throughput` keeps only large images (A6), the others all."""
    admission = "large-only" if experiment == "throughput" else "all"
    return simulate(replace(base, cache_admission=admission), source, load)  # type: ignore[arg-type]
