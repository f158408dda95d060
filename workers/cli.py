"""`modm models ...` and `modm worker`. Nothing here imports torch; `check` and `pull` do, when they run.

Settings and catalogue are imported inside the commands: pydantic alone would double the time of `modm --help`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modm_tasks.errors import ConfigError, ModmError, UnavailableError
from modm_tasks.output import handle_errors

if TYPE_CHECKING:
    from modm_tasks.queues import Role
    from modm_tasks.settings import Settings
    from workers.catalogue import ModelEntry

models_app = typer.Typer(no_args_is_help=True, help="The model catalogue.", rich_markup_mode=None)

_ROLES: dict[str, Role] = {"large": "large", "small": "small"}

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def _row(entry: ModelEntry) -> dict[str, Any]:
    from workers.catalogue import missing_weights

    return entry.model_dump(mode="json") | {"source": entry.source, "ready": missing_weights(entry) is None}


@models_app.command("list")
@handle_errors
def list_models(as_json: Json = False) -> None:
    """All models by name, with aliases, steps, guidance and memory."""
    from modm_tasks.settings import load_settings
    from workers.catalogue import load_catalogue

    entries = load_catalogue(load_settings().models_file).values()
    if as_json:
        typer.echo(json.dumps([_row(entry) for entry in entries], indent=2))
        return
    typer.echo(f"{'NAME':34} {'ALIASES':24} {'STEPS':>5} {'GUIDANCE':>8} {'GIB':>5}  SOURCE")
    for e in entries:
        steps = str(e.steps or "")
        source = "bundled" if e.folder and e.licence.endswith("bundled") else e.source
        typer.echo(f"{e.name:34} {','.join(e.aliases):24} {steps:>5} {e.guidance_scale:8g} {e.memory_gib:5g}  {source}")


@models_app.command("show")
@handle_errors
def show_model(name: str, as_json: Json = False) -> None:
    """One entry in full."""
    from modm_tasks.settings import load_settings
    from workers.catalogue import find

    row = _row(find(name, load_settings().models_file))
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        typer.echo(f"{key:20} {', '.join(map(str, value)) if isinstance(value, list) else value}")


@models_app.command("pull")
@handle_errors
def pull_model(name: str) -> None:
    """Download a model's weights from the hub into its cache. Gated ones need HF_TOKEN."""
    from modm_tasks.settings import load_settings
    from workers.catalogue import find
    from workers.hub import pull

    typer.echo(pull(find(name, load_settings().models_file)))


@models_app.command("check")
@handle_errors
def check_model(name: str, steps: Annotated[int, typer.Option(min=1, max=50)] = 2, as_json: Json = False) -> None:
    """Load a model, draw and refine with a few steps, print memory and seconds per step."""
    from modm_tasks.settings import load_settings
    from workers.catalogue import find, missing_weights

    settings = load_settings()
    entry = find(name, settings.models_file)
    if problem := missing_weights(entry):
        raise ConfigError(problem, field="model")
    from workers.check import check

    report = check(entry, settings, steps=steps)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        typer.echo(f"{key:20} {value}")


@handle_errors
def worker_command(
    gpu: Annotated[str, typer.Option("--gpu", help="Index of the GPU; on a CPU machine just a number.")] = "0",
    all_gpus: Annotated[bool, typer.Option("--all-gpus", help="One worker for every GPU of this machine.")] = False,
    role: Annotated[str, typer.Option(help="large | small | auto: as the controller wants.")] = "auto",
    name: Annotated[str, typer.Option(help="Node name; default gpuN@HOST.")] = "",
    share: Annotated[int, typer.Option(min=1, help="Workers that share this machine's CPU cores.")] = 1,
    large_model: Annotated[str, typer.Option(help="Catalogue name; default MODM_LARGE_MODEL.")] = "",
    small_model: Annotated[str, typer.Option(help="Catalogue name; default MODM_SMALL_MODEL.")] = "",
) -> None:
    """One Celery worker for one GPU, the device pinned before it starts."""
    from modm_tasks.settings import load_settings
    from workers.catalogue import check_pair
    from workers.pinning import pinned, thread_count

    given = {k: v for k, v in {"large_model": large_model, "small_model": small_model}.items() if v}
    os.environ.update({f"MODM_{k.upper()}": v for k, v in given.items()})
    settings = load_settings(**given)
    if role not in {"large", "small", "auto"}:
        raise ConfigError(f"role must be large, small or auto, not {role!r}", field="role")
    if settings.worker.engine == "diffusers":
        check_pair(settings)
    if all_gpus:
        raise typer.Exit(run_all(role, settings))
    node = name or f"gpu{gpu}@%h"
    environ = os.environ | pinned(gpu, os.environ, threads=thread_count(settings, share=share))
    argv = worker_argv(settings, node, start_queues(settings, node, gpu, role))
    sys.stdout.flush()
    os.execvpe(argv[0], argv, environ)


def worker_argv(settings: Settings, node: str, queues: tuple[str, ...]) -> list[str]:
    """The Celery command line of one worker."""
    return [
        *(sys.executable, "-m", "celery", "-A", "modm_tasks.app", "worker", "-n", node, "-Q", ",".join(queues)),
        *("-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle", "--loglevel", settings.log_level),
    ]


def start_queues(settings: Settings, node: str, gpu: str, role: str) -> tuple[str, ...]:
    """Queues to begin with; the controller mends them later.

    ``auto`` takes the role that is desired already, so that a worker that restarts comes back as what it was, else it
    starts able to do everything, with GPU 0 as the first large worker.
    """
    from modm_tasks.queues import queues_of

    mode = settings.worker.mode
    wanted = _ROLES.get(role) or _desired(settings, node)
    if wanted is not None:
        return queues_of(mode, wanted)
    return queues_of("pooled", "large" if gpu in {"", "0"} else "small")


def _desired(settings: Settings, node: str) -> Role | None:
    import socket

    from modm_tasks.ledger import Ledger

    full = node.replace("%h", socket.gethostname())
    try:
        return Ledger.from_settings(settings).desired_role(full)
    except UnavailableError:
        return None


def gpu_count() -> int:
    """GPUs that torch sees, asked in another process so that this one never initialises a device."""
    code = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(found.stdout or 0)


def run_all(role: str, settings: Settings) -> int:
    """One `modm worker` per GPU; ends when all have ended. A signal that stops this process is passed on."""
    import signal
    from types import FrameType

    count = gpu_count()
    if count == 0:
        raise ModmError("no GPU found; `modm worker --gpu 0` starts a CPU worker")
    begin = [sys.executable, "-m", "orchestrator.cli", "worker", "--role", role, "--share", str(count)]
    running = [subprocess.Popen([*begin, "--gpu", str(gpu)]) for gpu in range(count)]

    def pass_on(signum: int, frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(signum, pass_on)
    codes = [process.wait() for process in running]
    return max(128 - code if code < 0 else code for code in codes)  # one that was killed has failed too
