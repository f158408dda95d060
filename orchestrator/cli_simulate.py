"""`modm simulate`: MoDM under a virtual clock. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modm_tasks.output import handle_errors, print_json

Opt = typer.Option


@handle_errors
def simulate_command(
    embeddings: Annotated[Path | None, Opt(help=".npy [n, dim] of text vectors, or .npz with text and image.")] = None,
    hit_rate: Annotated[float | None, Opt(help="Statistical similarities instead: this share of hits.")] = None,
    k_share: Annotated[str, Opt(help="P(k) of --hit-rate, e.g. 30:.5,25:.5; default all rungs alike.")] = "",
    ladder: Annotated[str | None, Opt(help="SIMILARITY:K,...; default the paper's.")] = None,
    ladder_file: Annotated[Path | None, Opt(help="Ladder JSON (docs/policies.md has its form).")] = None,
    warm_cache: Annotated[int, Opt(min=0, help="Rows in the cache at time 0; the rest arrive.")] = 0,
    gpus: Annotated[int, Opt(min=1, max=100_000, help="Workers, one per GPU.")] = 4,
    profile: Annotated[str | None, Opt(help="Device profile: mi210, a40, flux, or a TOML file.")] = None,
    large: Annotated[str, Opt(help="Large model of the profile.")] = "sd3.5-large",
    small: Annotated[str, Opt(help="Small model of the profile.")] = "sdxl",
    large_s: Annotated[float | None, Opt(help="Seconds of a full large image.")] = None,
    small_s: Annotated[float | None, Opt(help="Seconds of a full small image.")] = None,
    arrivals: Annotated[str, Opt(help="poisson | burst | closed | recorded | rising | fluctuating.")] = "poisson",
    rate_per_min: Annotated[float, Opt(help="Offered load.")] = 0.0,
    num_requests: Annotated[int, Opt(min=0, help="How many; 0 = all rows after the warm cache.")] = 0,
    concurrency: Annotated[int, Opt(min=1, help="Open requests of closed arrivals.")] = 1,
    arrivals_file: Annotated[Path | None, Opt(help="JSONL with arrival_s, for recorded arrivals.")] = None,
    seed: Annotated[int, Opt(min=0, help="Of every random draw.")] = 42,
    policy: Annotated[str, Opt(help="modm | modm-plus | large-only | small-only.")] = "modm-plus",
    features: Annotated[str, Opt("--with", help="modm-plus mechanisms by name: inflight,late-binding,...")] = "",
    workers: Annotated[str, Opt(help="pooled | roles | pooled-roles.")] = "pooled",
    allocation: Annotated[str, Opt(help="static | modm-quality | modm-throughput | slo; moves the roles.")] = "slo",
    variant: Annotated[str, Opt(help="paper | code: where the two differ.")] = "paper",
    static_large: Annotated[int, Opt(min=0, help="Large workers of --allocation static.")] = 1,
    period_s: Annotated[float, Opt(help="Seconds between the controller's decisions.")] = 180.0,
    switch_s: Annotated[float, Opt(min=0, help="Seconds that a role move costs a worker.")] = 0.0,
    cache_capacity: Annotated[int, Opt(help="Images kept.")] = 10_000,
    cache_eviction: Annotated[str, Opt(help="fifo | lru | utility.")] = "fifo",
    cache_admission: Annotated[str, Opt(help="all | large-only.")] = "all",
    slo_multiple: Annotated[float, Opt(help="SLO as a multiple of the large model's latency.")] = 2.0,
    admit: Annotated[bool, Opt("--admit", help="Refuse at arrival what would miss its SLO.")] = False,
    degrade: Annotated[bool, Opt("--degrade", help="Overload control: lower quality, then refuse.")] = False,
    wait_bound_s: Annotated[float, Opt(help="Longest wait on a source, from the request's turn.")] = 600.0,
    wait_depth: Annotated[int, Opt(min=1, help="Longest chain of waiting requests.")] = 8,
    report: Annotated[Path | None, Opt(help="Write report.json and CSV files to this folder.")] = None,
    as_json: Annotated[bool, Opt("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Simulate a cluster with the production decisions; prints what `report.json` of a real run holds."""
    from orchestrator.decisions.routing import check_policy, features_of
    from orchestrator.simulator import run
    from orchestrator.simulator.config import SimConfig

    chosen = run.choose_ladder(ladder, ladder_file)
    seconds = run.speeds(profile=profile, large=large, small=small, large_s=large_s, small_s=small_s)
    config = SimConfig(
        gpus=gpus, ladder=chosen, **seconds, policy=check_policy(policy),
        features=features_of(policy, features), workers=workers, allocation=allocation, variant=variant,  # type: ignore[arg-type]
        static_large=static_large, period_s=period_s, switch_s=switch_s, cache_capacity=cache_capacity,
        cache_eviction=cache_eviction, cache_admission=cache_admission,  # type: ignore[arg-type]
        slo_multiple=slo_multiple, admit=admit, degrade=degrade,
        wait_bound_s=wait_bound_s, wait_depth=wait_depth, seed=seed,
    )  # fmt: skip
    run.check(config)
    load = run.Load(
        kind=arrivals, rate_per_min=rate_per_min, num_requests=num_requests, concurrency=concurrency, seed=seed,
        file=arrivals_file,
    )  # fmt: skip
    source = run.choose_source(
        embeddings=embeddings, hit_rate=hit_rate, k_share=k_share, warm=warm_cache, ladder=chosen,
        num_requests=num_requests, seed=seed,
    )  # fmt: skip
    outcome = run.simulate(config, source, load)
    if report is not None:
        from orchestrator.simulator.files import write_run

        write_run(outcome, report)
    _show(outcome.report(), as_json=as_json)


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    latency, slo = found["latency_s"], found["slo"]
    typer.echo(f"policy {found['policy']} {','.join(found['features'])}".rstrip())
    typer.echo(" ".join(f"{name}={n}" for name, n in found["requests"].items()))
    typer.echo(f"served per minute {found['served_per_min']}, within the SLO {slo['goodput_per_min']}")
    typer.echo(f"hit rate {found['hit_rate']}, role moves {found['role_moves']}")
    typer.echo("latency_s " + "  ".join(f"{name} {value}" for name, value in latency.items()))
    typer.echo(f"over 2x SLO {slo['violations_2x']:.1%}, over 4x {slo['violations_4x']:.1%}")
