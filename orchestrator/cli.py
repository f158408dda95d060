"""`modm`: the composition root. It alone may reach every folder, and does so inside commands, so that help is instant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modm_tasks import __version__
from modm_tasks.output import handle_errors, print_json
from orchestrator import model_names

if TYPE_CHECKING:
    from modm_tasks.settings import Settings

app = typer.Typer(
    name="modm",
    help="Serve text-to-image diffusion with a cache of final images. Start with `modm up`, then `modm submit`.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    add_completion=False,
)
config_app = typer.Typer(help="Settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"modm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """MoDM serving."""


@config_app.command("show")
@handle_errors
def config_show(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Print the settings in force; secrets are hidden."""
    from modm_tasks.settings import load_settings

    values: dict[str, Any] = load_settings().model_dump(mode="json")
    if json:
        print_json(values)
        return
    for name, value in values.items():
        if isinstance(value, dict):
            for sub, inner in value.items():
                typer.echo(f"{name}.{sub} = {inner!r}")
        else:
            typer.echo(f"{name} = {value!r}")


@app.command()
@handle_errors
def orchestrator(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = None,
) -> None:
    """Run the orchestrator: HTTP API, embedding, routing, cache."""
    from orchestrator.serve import serve

    serve(host=host, port=port)


def _canonical(name: str, settings: Settings) -> str:
    from workers.catalogue import canonical

    return canonical(name, settings)


def _mount() -> None:
    """Sub-apps of the folders. Each module imports only typer and the standard library at its top."""
    from ops.calibration.cli import calibrate_command
    from ops.cli import doctor, down, flower, up
    from orchestrator.cli_bench_compare import bench_app
    from orchestrator.cli_controller import controller_app, workers_app
    from orchestrator.cli_keys import keys_app
    from orchestrator.cli_profile import profile_command
    from orchestrator.cli_report import report_app
    from orchestrator.cli_requests import requests_app
    from orchestrator.cli_simulate import simulate_command
    from orchestrator.cli_status import status_command
    from orchestrator.cli_submit import submit, submit_trace
    from orchestrator.cli_trace import trace_app
    from vector_store.cli import cache_app
    from workers.cli import models_app, worker_command

    commands: dict[str, Callable[..., None]] = {
        "up": up,
        "down": down,
        "status": status_command,
        "submit": submit,
        "submit-trace": submit_trace,
        "worker": worker_command,
        "flower": flower,
        "doctor": doctor,
        "profile": profile_command,
        "simulate": simulate_command,
        "calibrate": calibrate_command,
    }
    for name, command in commands.items():
        app.command(name)(command)
    for name, sub in {
        "controller": controller_app,
        "workers": workers_app,
        "cache": cache_app,
        "requests": requests_app,
        "trace": trace_app,
        "report": report_app,
        "bench": bench_app,
        "models": models_app,
        "keys": keys_app,
    }.items():
        app.add_typer(sub, name=name)


_mount()
model_names.use(_canonical)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
