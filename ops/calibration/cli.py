"""`modm calibrate`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modm_tasks.output import handle_errors, note, print_json

Opt = typer.Option


@handle_errors
def calibrate_command(
    prompts: Annotated[Path, typer.Argument(help="Prompts: a text file or any trace that `modm trace inspect` reads.")],
    output: Annotated[
        Path, Opt("--output", "-o", help="The ladder file; MODM_ROUTING__LADDER_FILE names it to the router.")
    ],
    alpha: Annotated[float, Opt(help="Quality factor: what refining must keep of the large model's quality.")] = 0.95,
    metric: Annotated[
        str, Opt(help="clip, or module:callable(prompts, images) -> numbers, higher is better.")
    ] = "clip",
    large_model: Annotated[str | None, Opt(help="Catalogue name; default MODM_LARGE_MODEL.")] = None,
    small_model: Annotated[str | None, Opt(help="Catalogue name; default MODM_SMALL_MODEL.")] = None,
    embedder: Annotated[str | None, Opt(help="Default MODM_EMBEDDER.")] = None,
    depths: Annotated[str, Opt(help="Skipped steps to try, comma-separated.")] = "5,10,15,20,25,30",
    num_prompts: Annotated[int, Opt(min=0, help="Different prompts used; 0 = all.")] = 0,
    pairs: Annotated[int, Opt(min=1, help="Cached images tried for each prompt and depth.")] = 2,
    least_pairs: Annotated[int, Opt(min=2, help="Pairs of like similarity that a rung must rest on.")] = 25,
    work: Annotated[
        Path | None, Opt(help="Images drawn so far; default MODM_HOME/calibration. New weights: a new one.")
    ] = None,
    json: Annotated[bool, Opt("--json", help="The ladder file on stdout.")] = False,
) -> None:
    """Fit ladder, prediction and floors for an (embedder, large, small) triple; half of the prompts are held out."""
    from modm_tasks.errors import InvalidInputError
    from modm_tasks.output import table
    from modm_tasks.settings import load_settings
    from ops.calibration.run import Plan, calibrate

    chosen = {"large_model": large_model, "small_model": small_model, "embedder": embedder}
    settings = load_settings(**{k: v for k, v in chosen.items() if v is not None})
    try:
        steps = tuple(sorted({int(k) for k in depths.split(",")}))
    except ValueError:
        raise InvalidInputError(f"depths must look like 5,10,15, not {depths!r}", field="depths") from None
    plan = Plan(
        prompts=prompts, output=output, work=work or settings.home / "calibration", alpha=alpha, metric=metric,
        depths=steps, num_prompts=num_prompts, pairs=pairs, least=least_pairs,
    )  # fmt: skip
    ladder = calibrate(settings, plan, note)
    if json:
        print_json(ladder)
        return
    held_out = {r["skipped_steps"]: r for r in ladder["hold_out"]["rungs"]}
    floors = {r["skipped_steps"]: r for r in ladder["hold_out"]["verification"]["rungs"]}
    table(
        ["similarity from", "skipped steps", "of large, held out", "pairs", "floor", "precision", "recall"],
        [
            [r["min_similarity"], (k := r["skipped_steps"]), held_out[k]["of_large"], held_out[k]["pairs"],
             r.get("verify_floor"), floors[k]["precision"], floors[k]["recall"]]
            for r in ladder["rungs"]
        ],
    )  # fmt: skip
    note(f"ladder: {output}")
