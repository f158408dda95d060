"""`modm bench`: the experiments of the reference, on the running stack or simulated. Imports nothing heavy at its top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modm_tasks.output import handle_errors, note, print_json

if TYPE_CHECKING:
    from orchestrator.simulator.config import SimConfig
    from orchestrator.simulator.similarity import Similarities

Opt = typer.Option
bench_app = typer.Typer(
    no_args_is_help=True, help="Experiments: throughput, SLO, changing load.", rich_markup_mode=None
)

Report = Annotated[Path, Opt(help="Folder of the results.")]
Simulate = Annotated[bool, Opt("--simulate", help="In the simulator instead of the running stack.")]
Trace = Annotated[Path | None, Opt(help="Trace for the running stack.")]
Rates = Annotated[str, Opt(help="Offered per minute, comma-separated.")]
Number = Annotated[int, Opt(min=0, help="Requests of each run; 0 = all.")]
Policy = Annotated[str, Opt(help="Router policy.")]
With = Annotated[str, Opt("--with", help="modm-plus mechanisms by name.")]
Allocation = Annotated[str, Opt(help="Controller policy.")]
Workers = Annotated[str, Opt(help="pooled | roles | pooled-roles (simulated only).")]
Embeddings = Annotated[Path | None, Opt(help="Vectors for --simulate (.npy or .npz).")]
Warm = Annotated[int, Opt(min=0, help="Simulated: rows in the cache at first. Stack: requests of the warm-up.")]
CacheDir = Annotated[Path | None, Opt(help="Stack: images imported before the run.")]
ImageDir = Annotated[Path | None, Opt(help="Stack: where the results are copied.")]
Ladder = Annotated[str | None, Opt(help="Simulated: SIMILARITY:K,...")]
Profile = Annotated[str, Opt(help="Simulated: device profile.")]
Large = Annotated[str, Opt(help="Simulated: large model of the profile.")]
Small = Annotated[str, Opt(help="Simulated: small model of the profile.")]
Gpus = Annotated[int, Opt(min=1, help="Simulated: GPUs.")]
Seed = Annotated[int, Opt(min=0, help="Of the arrivals.")]


def _rates(text: str) -> list[float]:
    from modm_tasks.errors import InvalidInputError

    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise InvalidInputError(f"rate-per-min must be numbers above 0 like 4,6,8, not {text!r}", field="rate_per_min")
    return found


def _simulated(
    *,
    embeddings: Path | None,
    ladder: str | None,
    warm: int,
    profile: str,
    large: str,
    small: str,
    gpus: int,
    **more: Any,
) -> tuple[SimConfig, Similarities]:
    from modm_tasks.errors import InvalidInputError
    from orchestrator.simulator import run
    from orchestrator.simulator.config import SimConfig

    if embeddings is None:
        raise InvalidInputError("--simulate needs --embeddings FILE.npy", field="embeddings")
    chosen = run.choose_ladder(ladder, None)
    seconds = run.speeds(profile=profile, large=large, small=small, large_s=None, small_s=None)
    config = SimConfig(gpus=gpus, large_s=seconds[0], small_s=seconds[1], ladder=chosen, **more)
    run.check(config)
    return config, run.vectors(embeddings, warm=warm, ladder=chosen)


def _run_all(
    name: str, kind: str, rates: list[float], report: Path, simulate: bool, o: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """One run for each rate, each in its own folder. Returns the reports by run."""
    if simulate:
        from orchestrator.decisions.routing import features_of

        config, source = _simulated(
            embeddings=o["embeddings"], ladder=o["ladder"], warm=o["warm"], profile=o["profile"], large=o["large"],
            small=o["small"], gpus=o["gpus"], policy=o["policy"], workers=o["workers"], allocation=o["allocation"],
            features=features_of(o["policy"], o["features"]), seed=o["seed"],
        )  # fmt: skip
        one: Callable[[float, Path], dict[str, Any]] = lambda rate, folder: _simulate_one(  # noqa: E731
            config, source, name, kind, rate, folder, o
        )
    else:
        one = lambda rate, folder: _measure_one(name, kind, rate, folder, o)  # noqa: E731
    reports = {}
    for rate in rates:
        label = name if len(rates) == 1 else f"{name}-{rate:g}"
        note(f"{label}: {kind}, {rate:g} a minute")
        reports[label] = one(rate, report if len(rates) == 1 else report / label)
    if len(rates) > 1:
        from orchestrator.simulator.plots import over_rate

        over_rate({rate: reports[f"{name}-{rate:g}"] for rate in rates}, report)
    return reports


def _simulate_one(
    config: SimConfig, source: Similarities, name: str, kind: str, rate: float, folder: Path, o: dict[str, Any]
) -> dict[str, Any]:
    from orchestrator.simulator.experiments import one
    from orchestrator.simulator.files import write_run
    from orchestrator.simulator.run import Load

    load = Load(kind=kind, rate_per_min=rate, num_requests=o["num_requests"], seed=o["seed"])
    return write_run(one(config, source, load, name), folder)


def _measure_one(name: str, kind: str, rate: float, folder: Path, o: dict[str, Any]) -> dict[str, Any]:
    """On the running stack: a replay over HTTP, reported like that of `modm submit-trace`."""
    from contextlib import ExitStack

    from modm_tasks.errors import InvalidInputError
    from modm_tasks.settings import load_settings
    from orchestrator.report.progress import shown
    from orchestrator.report.write import write_report
    from orchestrator.run_trace import RunPlan, run_trace, save_images
    from orchestrator.targets import open_target
    from orchestrator.traces.load import load_trace

    if o["trace"] is None:
        raise InvalidInputError("give --trace FILE for the running stack, or --simulate", field="trace")
    wanted = o["num_requests"] + o["warm"] if o["num_requests"] else None
    rows = load_trace(o["trace"], num_requests=wanted).rows
    namespace = f"bench-{name}-{rate:g}".replace(".", "-")
    with ExitStack() as stack:
        target = open_target(load_settings(), stack, direct=False)
        if o["cache_directory"] is not None:
            target.import_images(o["cache_directory"], namespace, note)
        plan = RunPlan(
            rows=rows, arrivals=kind, rate_per_min=rate, seed=o["seed"], warm_up=o["warm"], policy=o["policy"],
            features=o["features"] or None, namespace=namespace, name=f"{name} {rate:g}/min",
            control={"allocation": o["allocation"], "mode": "roles" if o["workers"] == "roles" else "pooled"},
        )  # fmt: skip
        run = run_trace(target, plan, shown=shown, sheet=True)
        if o["image_directory"] is not None and not run.result.interrupted:
            save_images(target, run.result.records, o["image_directory"])
    write_report(folder, run.report, run.result.records, sheet=run.sheet)
    if run.result.interrupted:
        raise KeyboardInterrupt
    return run.report


def _show(reports: dict[str, dict[str, Any]], report: Path, as_json: bool) -> None:
    if as_json:
        print_json(reports)
    else:
        from modm_tasks.output import table

        table(
            ["run", "done", "refused", "served /min", "hit rate", "p50 s", "p99 s", "over 2x", "over 4x", "role moves"],
            [
                [name, r["requests"]["done"], r["requests"]["refused"], r["served_per_min"], r["hit_rate"],
                 r["latency_s"]["p50"], r["latency_s"]["p99"], r["slo"]["violations_2x"], r["slo"]["violations_4x"],
                 r["role_moves"]]
                for name, r in reports.items()
            ],
        )  # fmt: skip
    note(f"results: {report}")


def _command(name: str, kind: str, default_rate: str, help_text: str) -> None:
    @bench_app.command(name, help=help_text)
    @handle_errors
    def command(
        report: Report = Path("bench-report"),
        simulate: Simulate = False,
        rate_per_min: Rates = default_rate,
        num_requests: Number = 0,
        policy: Policy = "modm",
        features: With = "",
        allocation: Allocation = "slo",
        workers: Workers = "pooled-roles",
        trace: Trace = None,
        warm_up: Warm = 0,
        cache_directory: CacheDir = None,
        image_directory: ImageDir = None,
        embeddings: Embeddings = None,
        ladder: Ladder = None,
        profile: Profile = "a40",
        large: Large = "sd3.5-large",
        small: Small = "sdxl",
        gpus: Gpus = 4,
        seed: Seed = 42,
        json: Annotated[bool, Opt("--json", help="Reports as JSON on stdout.")] = False,
    ) -> None:
        from orchestrator.decisions.routing import check_policy

        check_policy(policy)
        options = {
            "num_requests": num_requests, "policy": policy, "features": features, "allocation": allocation,
            "workers": workers, "trace": trace, "warm": warm_up, "cache_directory": cache_directory,
            "image_directory": image_directory, "embeddings": embeddings, "ladder": ladder, "profile": profile,
            "large": large, "small": small, "gpus": gpus, "seed": seed,
        }  # fmt: skip
        rates = [1.0] if kind == "burst" else _rates(rate_per_min)
        _show(_run_all(name, kind, rates, report, simulate, options), report, json)


_command(
    "throughput", "burst", "1", "Everything at once. Simulated with only large images cached, as in the reference."
)
_command("slo", "poisson", "4,6,8,10", "Poisson arrivals at each rate: P99 and SLO violations.")
_command("rising", "rising", "10", "The reference's sigmoid rise up to the rate.")
_command("fluctuating", "fluctuating", "10", "Load that swings up to the rate.")


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

    config, source = _simulated(
        embeddings=embeddings, ladder=ladder, warm=warm_cache, profile=profile, large=large, small=small, gpus=gpus,
        admit=not no_admission,
    )  # fmt: skip
    cells = run_sweep(config, source, rates=_rates(rate_per_min), seeds=[42 + i for i in range(seeds)], progress=note)
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
