"""`modm profile`: seconds per image and per step of this machine's models. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modm_tasks.output import handle_errors, note, print_json

Opt = typer.Option
HOW = "Measured by `modm profile` with {workers} workers drawing at once; seconds."


@handle_errors
def profile_command(
    save: Annotated[bool, Opt("--save", help="Write MODM_HOME/profile.toml, which is `--profile local`.")] = False,
    output: Annotated[Path | None, Opt(help="Write the profile to this .toml file instead.")] = None,
    workers: Annotated[int, Opt(min=1, max=64, help="Processes that draw at once, as many as will serve.")] = 2,
    images: Annotated[int, Opt(min=5, help="Counted draws of each model and process.")] = 5,
    json: Annotated[bool, Opt("--json", help="As JSON.")] = False,
) -> None:
    """Draw with the configured models and print what an image and a step cost; medians, the first draws not counted."""
    from modm_tasks.errors import InvalidInputError
    from modm_tasks.output import table
    from modm_tasks.settings import load_settings
    from orchestrator.device_profiles import LOCAL_FILE, as_toml

    if output is not None and output.suffix != ".toml":
        raise InvalidInputError(f"--output must end in .toml, not {output.name!r}", field="output")
    settings = load_settings()
    note(f"{workers} workers draw {images} images with each model")
    found = run(workers=workers, images=images)
    if json:
        print_json(found)
    else:
        table(
            ["model", "s per image", "s per step", "draws"],
            [[name, row["image_s"], row["step_s"], row["draws"]] for name, row in found["models"].items()],
        )
        typer.echo(
            f"{found['device']}, {found['workers']} workers; {found['overhead_s']} s beside drawing for each image"
        )
    path = output or (settings.home / LOCAL_FILE if save else None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_toml(found | {"how": HOW.format(workers=workers)}), encoding="utf-8")
        note(f"written: {path}")


def run(*, workers: int, images: int) -> dict[str, Any]:
    """What `workers.profile` prints: in processes of its own, because nothing on this side loads torch.

    Raises ModmError with the exit status of the measuring process, which has said on stderr what was wrong.
    """
    import json as json_module
    import subprocess
    import sys

    from modm_tasks.errors import EngineError

    command = [sys.executable, "-m", "workers.profile", "--workers", str(workers), "--images", str(images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EngineError(f"measuring ended with status {done.returncode}")
    answer: dict[str, Any] = json_module.loads(done.stdout)
    return answer
