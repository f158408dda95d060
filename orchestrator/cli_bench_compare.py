"""`modm bench sweep | policies | ablation | validate`: comparisons of policies, and of the simulator with the stack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modm_tasks.output import handle_errors, note, print_json
from orchestrator.cli_bench import Gpus, Ladder, Large, Opt, Profile, Rates, Seed, Small, bench_app, rates_of, simulated


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
def validate(
    runs: Annotated[list[Path], typer.Argument(help="Report folders of `modm submit-trace --report`.")],
    report: Annotated[Path | None, Opt(help="File for the result, JSON.")] = None,
    json: Annotated[bool, Opt("--json", help="JSON on stdout.")] = False,
) -> None:
    """Simulate runs of the real stack again: throughput within 10 %, median latency within 15 %, else exit 4."""
    import json as json_module

    from modm_tasks.errors import GateError
    from modm_tasks.output import table
    from orchestrator.simulator.validate import validate as compare

    found = [compare(folder) for folder in runs]
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json_module.dumps(found, indent=1) + "\n", encoding="utf-8")
    if json:
        print_json(found)
    else:
        table(
            ["run", "served /min", "simulated", "p50 s", "simulated", "errors"],
            [
                [f["run"], f["real"]["served_per_min"], f["simulated"]["served_per_min"], f["real"]["latency_p50_s"],
                 f["simulated"]["latency_p50_s"], "  ".join(f"{e:.1%}" for e in f["errors"].values())]
                for f in found
            ],
        )  # fmt: skip
    missed = [f["run"] for f in found if not f["passed"]]
    if missed:
        raise GateError(
            f"the simulator is off for {', '.join(missed)}: over 10 % in throughput or 15 % in median latency"
        )


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
