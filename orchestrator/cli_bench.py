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
Large = Annotated[str, Opt("--large-model", "--large", help="Simulated: large model of the profile.")]
Small = Annotated[str, Opt("--small-model", "--small", help="Simulated: small model of the profile.")]
LargeAny = Annotated[
    str | None,
    Opt("--large-model", "--large", help="Stack: refuse unless the workers serve it. Simulated: of the profile."),
]
SmallAny = Annotated[str | None, Opt("--small-model", "--small", help="As --large-model.")]
Flower = Annotated[str, Opt(help="Stack: URL of Flower, to be asked for the roles too (rising, fluctuating).")]
Period = Annotated[
    float, Opt(min=0, help="Seconds between the controller's decisions; 0 = the stack's, simulated 180.")
]
Gpus = Annotated[int, Opt(min=1, help="Simulated: GPUs.")]
Seed = Annotated[int, Opt(min=0, help="Of the arrivals.")]


def rates_of(text: str) -> list[float]:
    from modm_tasks.errors import InvalidInputError

    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise InvalidInputError(f"rate-per-min must be numbers above 0 like 4,6,8, not {text!r}", field="rate_per_min")
    return found


def simulated(
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
    config = SimConfig(gpus=gpus, ladder=chosen, **seconds, **more)
    run.check(config)
    return config, run.vectors(embeddings, warm=warm, ladder=chosen)


def _run_all(
    name: str, kind: str, rates: list[float], report: Path, simulate: bool, o: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """One run for each rate, each in its own folder. Returns the reports by run."""
    if simulate:
        from orchestrator.decisions.routing import features_of

        config, source = simulated(
            embeddings=o["embeddings"], ladder=o["ladder"], warm=o["warm"], profile=o["profile"],
            large=o["large"] or "sd3.5-large", small=o["small"] or "sdxl",
            gpus=o["gpus"], policy=o["policy"], workers=o["workers"], allocation=o["allocation"],
            features=features_of(o["policy"], o["features"]), seed=o["seed"], period_s=o["period_s"] or 180.0,
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
    from modm_tasks.errors import InvalidInputError
    from modm_tasks.settings import load_settings
    from orchestrator.bench import Experiment, measure
    from orchestrator.traces.load import load_trace

    if o["trace"] is None:
        raise InvalidInputError("give --trace FILE for the running stack, or --simulate", field="trace")
    wanted = o["num_requests"] + o["warm"] if o["num_requests"] else None
    it = Experiment(
        name=name, kind=kind, rate_per_min=rate, rows=load_trace(o["trace"], num_requests=wanted).rows, folder=folder,
        policy=o["policy"], features=o["features"] or None, allocation=o["allocation"], workers=o["workers"],
        warm_up=o["warm"], seed=o["seed"], cache_directory=o["cache_directory"], image_directory=o["image_directory"],
        flower=o["flower"], large_model=o["large"], small_model=o["small"],
        control={"period_s": o["period_s"]} if o["period_s"] else {},
    )  # fmt: skip
    return measure(load_settings(), it, witnessed=name in {"rising", "fluctuating"}).report


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
        flower: Flower = "",
        period_s: Period = 0.0,
        embeddings: Embeddings = None,
        ladder: Ladder = None,
        profile: Profile = "a40",
        large: LargeAny = None,
        small: SmallAny = None,
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
            "large": large, "small": small, "gpus": gpus, "seed": seed, "flower": flower, "period_s": period_s,
        }  # fmt: skip
        rates = [1.0] if kind == "burst" else rates_of(rate_per_min)
        _show(_run_all(name, kind, rates, report, simulate, options), report, json)


_command(
    "throughput", "burst", "1", "Everything at once. Simulated with only large images cached, as in the reference."
)
_command("slo", "poisson", "4,6,8,10", "Poisson arrivals at each rate: P99 and SLO violations.")
_command("rising", "rising", "10", "The reference's sigmoid rise up to the rate.")
_command("fluctuating", "fluctuating", "10", "Load that swings up to the rate.")
