"""`modm bench sweep | policies | ablation | validate`: comparisons of policies, and of the simulator with the stack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modm_tasks.output import handle_errors, note, print_json
from orchestrator.cli_bench import Gpus, Ladder, Large, Opt, Profile, Rates, Seed, Small, bench_app, rates_of, simulated

__all__ = ["bench_app"]


@bench_app.command()
@handle_errors
def sweep(
    embeddings: Annotated[Path, Opt(help="Vectors (.npy or .npz).")],
    ladder: Ladder = None,
    warm_cache: Annotated[int, Opt(min=0, help="Rows in the cache at first.")] = 1000,
    profile: Profile = "a40",
    large: Large = "sd3.5-large",
    small: Small = "sdxl",
    gpus: Gpus = 4,
    rate_per_min: Rates = "4,6,8,10",
    seeds: Annotated[int, Opt(min=1, help="Runs of each cell, with seeds 42, 43, ...")] = 5,
    no_admission: Annotated[bool, Opt("--no-admission", help="Take every request, however late it will be.")] = False,
    report: Annotated[Path | None, Opt(help="Folder of sweep.csv and sweep.md.")] = None,
) -> None:
    """Allocation policies against each other over the rate, simulated, all with the same admission control."""
    from dataclasses import asdict

    from orchestrator.simulator.experiments import sweep as run_sweep
    from orchestrator.simulator.experiments import table
    from orchestrator.simulator.files import write_csv

    config, source = simulated(
        embeddings=embeddings, ladder=ladder, warm=warm_cache, profile=profile, large=large, small=small, gpus=gpus,
        admit=not no_admission,
    )  # fmt: skip
    cells = run_sweep(config, source, rates=rates_of(rate_per_min), seeds=[42 + i for i in range(seeds)], progress=note)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        write_csv(report / "sweep.csv", [asdict(c) for c in cells])
        (report / "sweep.md").write_text(table(cells) + "\n", encoding="utf-8")
    typer.echo(table(cells))


@bench_app.command()
@handle_errors
def policies(
    embeddings: Annotated[Path, Opt(help="Vectors (.npy or .npz).")],
    ladder: Ladder = ".95:30,.90:25,.85:15,.80:10,.75:5",
    warm_cache: Annotated[int, Opt(min=0, help="Rows in the cache at first.")] = 1000,
    seeds: Annotated[int, Opt(min=1, help="Runs of each cell, with seeds 42, 43, ...")] = 5,
    report: Annotated[Path | None, Opt(help="Folder of policies.md and a CSV for each cluster.")] = None,
) -> None:
    """All tables of docs/policies.md that compare allocations: 4 x A40 and 16 x MI210, with SDXL and with SANA, simulated.

    Exit status 4 where `slo` breaks more SLOs than a published policy, or more than half as many where that exceeds 10 %;
    what it would miss without lowering quality, or with the published roles, is told too.
    """
    from dataclasses import asdict

    from modm_tasks.errors import GateError
    from orchestrator.simulator.experiments import CLUSTERS, missed_bars, table
    from orchestrator.simulator.experiments import sweep as run_sweep
    from orchestrator.simulator.files import write_csv

    text, missed = "", []
    for cluster in CLUSTERS:
        config, source = simulated(
            embeddings=embeddings, ladder=ladder, warm=warm_cache, profile=cluster.profile, large="sd3.5-large",
            small=cluster.small, gpus=cluster.gpus, admit=True,
        )  # fmt: skip
        note(cluster.name)
        cells = run_sweep(config, source, rates=cluster.rates, seeds=[42 + i for i in range(seeds)], progress=note)
        text += f"{cluster.name}\n\n{table(cells)}\n\n"
        missed += [f"{cluster.name}: {bar}" for bar in missed_bars(cells)]
        for name in ("slo, quality never lowered", "slo, published roles"):
            if bars := missed_bars(cells, ours=name):
                text += f"Over the bar: {'; '.join(bars)}\n\n"
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
            write_csv(report / f"{cluster.profile}-{cluster.small}.csv", [asdict(c) for c in cells])
            (report / "policies.md").write_text(text, encoding="utf-8")
    typer.echo(text.rstrip())
    if missed:
        raise GateError("; ".join(missed))


@bench_app.command()
@handle_errors
def validate(
    trace: Annotated[Path | None, Opt(help="Trace for the running stack.")] = None,
    run: Annotated[
        Path | None, Opt(help="Compare this run's folder instead of measuring one; needs --profile.")
    ] = None,
    profile: Annotated[str | None, Opt(help="Profile of this machine; default: measured on the stack first.")] = None,
    arrivals: Annotated[str, Opt(help="poisson | closed | burst | rising | fluctuating")] = "poisson",
    rate_per_min: Annotated[float, Opt(min=0.001, help="Offered load, or its peak.")] = 120.0,
    num_requests: Annotated[int, Opt(min=12, help="Requests of the run.")] = 200,
    concurrency: Annotated[int, Opt(min=1, help="Users of the closed loop.")] = 2,
    policy: Annotated[str, Opt(help="Router policy.")] = "modm",
    allocation: Annotated[str, Opt(help="Controller policy.")] = "slo",
    workers: Annotated[str, Opt(help="pooled-roles | roles")] = "pooled-roles",
    cache_directory: Annotated[Path | None, Opt(help="Images imported before the run.")] = None,
    seed: Seed = 42,
    report: Annotated[Path, Opt(help="Folder of the result.")] = Path("validate-report"),
    json: Annotated[bool, Opt("--json", help="JSON on stdout.")] = False,
) -> None:
    """The simulator against the running stack: throughput within 10 %, median latency within 15 %, else exit 4."""
    from modm_tasks.errors import GateError, InvalidInputError
    from modm_tasks.output import table
    from modm_tasks.settings import load_settings
    from orchestrator.bench import Experiment, measure, profile_stack, save_vectors
    from orchestrator.device_profiles import as_toml, load_profile
    from orchestrator.simulator.files import write_comparison
    from orchestrator.simulator.validate import compare
    from orchestrator.stack_profile import ROWS
    from orchestrator.traces.load import load_trace

    if (trace is None) == (run is None) or (run is not None and profile is None):
        raise InvalidInputError("give --trace, or --run with --profile", field="trace")
    report.mkdir(parents=True, exist_ok=True)
    if trace is not None:
        settings, rows = load_settings(), load_trace(trace, num_requests=ROWS + num_requests).rows
        run = report / "run"
        # The profile's requests come first in the trace, the run's after them: none is in both.
        it = Experiment(
            name="validate", kind=arrivals, rate_per_min=rate_per_min, rows=rows[ROWS:], folder=run, policy=policy,
            allocation=allocation, workers=workers, concurrency=concurrency, seed=seed, cache_directory=cache_directory,
        )  # fmt: skip
        if profile is None:
            profile = str(report / "profile.toml")
            Path(profile).write_text(as_toml(profile_stack(settings, it, rows[:ROWS])), encoding="utf-8")
        save_vectors(settings, measure(settings, it), cache_directory, run / "vectors.npz")
    assert run is not None
    assert profile is not None
    found, latencies = compare(run, load_profile(profile))
    write_comparison(found, latencies, report)
    if json:
        print_json(found)
    else:
        table(
            ["", "real", "simulated", "error", "allowed"],
            [
                [name, found["real"][name], found["simulated"][name], f"{error:.1%}", f"{found['limits'][name]:.0%}"]
                for name, error in found["errors"].items()
            ],
        )
    note(f"results: {report}")
    if not found["passed"]:
        raise GateError("the simulator is off: over 10 % in throughput or 15 % in median latency")


@bench_app.command()
@handle_errors
def ablation(
    embeddings: Annotated[Path, Opt(help="Vectors (.npy or .npz).")],
    ladder: Ladder = None,
    warm_cache: Annotated[int, Opt(min=0, help="Rows in the cache at first.")] = 1000,
    large_s: Annotated[float, Opt(help="Seconds of a full large image.")] = 60.0,
    small_s: Annotated[float, Opt(help="Seconds of a full small image.")] = 11.0,
    gpus: Gpus = 4,
    rate_per_min: Annotated[float, Opt(min=0, help="Poisson; 0 = everything at once.")] = 0.0,
    seed: Seed = 42,
) -> None:
    """Each mechanism by itself and all of them, beside the published algorithm and the fluid bound; simulated."""
    from orchestrator.simulator import run
    from orchestrator.simulator.config import SimConfig
    from orchestrator.simulator.experiments import ablation as run_ablation
    from orchestrator.simulator.experiments import ablation_table, fluid_bound_per_min

    chosen = run.choose_ladder(ladder, None)
    config = SimConfig(gpus=gpus, large_s=large_s, small_s=small_s, ladder=chosen)
    run.check(config)
    source = run.vectors(embeddings, warm=warm_cache, ladder=chosen)
    load = run.Load(kind="poisson" if rate_per_min > 0 else "burst", rate_per_min=rate_per_min, seed=seed)
    typer.echo(ablation_table(run_ablation(config, source, load), fluid_bound_per_min(config, source)))
