"""`modm up`, `down`, `flower`, `doctor`. Mounted by orchestrator/cli.py; nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from modm_tasks.output import handle_errors

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def _say(text: str) -> None:
    typer.echo(text, err=True)


#: Signals that asked `modm up` to end. An exception that is raised while an object is deleted is lost, so it is noted too.
_asked_to_end: list[int] = []


def _interrupted(signum: int, frame: FrameType | None) -> None:
    _asked_to_end.append(signum)
    raise KeyboardInterrupt


def _say_unless_ended(text: str) -> None:
    _say(text)
    if _asked_to_end:
        raise KeyboardInterrupt


@handle_errors
def up(
    workers: Annotated[int | None, typer.Option(min=0, max=64, help="Default: one for each GPU, else 2.")] = None,
    no_flower: Annotated[bool, typer.Option("--no-flower", help="Without Flower.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and stop everything at Ctrl-C.")] = False,
    mode: Annotated[str | None, typer.Option(help="pooled | roles; default MODM_WORKER__MODE.")] = None,
    as_json: Json = False,
) -> None:
    """Start Redis, orchestrator, controller, workers and Flower on this machine, and wait until they serve."""
    from modm_tasks.errors import ConfigError
    from modm_tasks.settings import load_settings
    from ops import stack

    settings = load_settings()
    if mode not in {None, "pooled", "roles"}:
        raise ConfigError(f"mode must be pooled or roles, not {mode!r}", field="mode")
    # Whoever ends `modm up` half way must not leave half a stack.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupted)
    state = stack.up(settings, stack.UpOptions(workers=workers, flower=not no_flower, mode=mode), _say_unless_ended)
    if as_json:
        typer.echo(stack.as_json(state))
    else:
        typer.echo(f"MoDM serves at {state.url} (API documents: {state.url}/docs)")
        if state.flower_url:
            typer.echo(f"Flower at {state.flower_url}")
        typer.echo('Try: modm submit "a red circle" --output image.png; stop with: modm down')
    if foreground:
        _stay(state, settings.home)


def _stay(state: object, home: Path) -> None:
    from ops import stack

    assert isinstance(state, stack.StackState)
    told: set[str] = set()
    pause = threading.Event()
    try:
        while not {"redis", "orchestrator"} & told:
            for name in set(stack.died(state)) - told:
                _say(f"{name} has ended; its log: {home / 'logs' / f'{name}.log'}")
                told.add(name)
            pause.wait(1.0)
    finally:
        _say("stopping")
        stack.down(home, grace_s=30.0, say=_say)
    raise typer.Exit(1)


@handle_errors
def down(
    grace_s: Annotated[float, typer.Option("--grace-s", min=0, help="Seconds for running work to end.")] = 30.0,
) -> None:
    """Stop what `modm up` started, also after a crash."""
    from modm_tasks.settings import load_settings
    from ops import stack

    stopped = stack.down(load_settings().home, grace_s=grace_s, say=_say)
    typer.echo("stopped" if stopped else "nothing is running")


@handle_errors
def flower(
    address: Annotated[str, typer.Option(help="Address; beyond loopback FLOWER_BASIC_AUTH is required.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 5555,
) -> None:
    """Run Flower, read-only, on this stack's broker."""
    from modm_tasks.settings import load_settings
    from ops.flower.command import flower_command, flower_environ

    settings = load_settings()
    command = flower_command(settings, address=address, port=port, environ=os.environ)
    sys.stdout.flush()
    os.execvpe(command[0], command, flower_environ(settings, os.environ))


@handle_errors
def doctor(as_json: Json = False) -> None:
    """Say what is missing or misconfigured, and the command that mends it. Exit status 1 when something is."""
    import json

    from ops.doctor import examine

    checks = examine()
    if as_json:
        typer.echo(json.dumps([c.model_dump() for c in checks], indent=2))
    else:
        for check in checks:
            mark = "ok  " if check.ok else "FAIL"
            typer.echo(f"{mark} {check.name}: {check.said}")
            if not check.ok:
                typer.echo(f"     mend: {check.mend}")
    if not all(c.ok for c in checks):
        raise typer.Exit(1)
