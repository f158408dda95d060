"""How every command speaks: data on stdout, everything for people on stderr, one line for an error, the right exit code.

Exit codes: 0 done, 1 failure, 2 usage or bad input, 3 a dependency is down, 4 a gate was missed, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import typer

from modm_tasks.errors import ModmError

P = ParamSpec("P")
T = TypeVar("T")


def handle_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Turn the project's errors into one line and an exit code; a traceback is for bugs only."""

    @functools.wraps(command)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except ModmError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader went away (`| head`): silence the flush at exit, which would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return call


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def note(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(text, err=True)


def interactive() -> bool:
    """Whether stderr is a terminal that may be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table on stdout. Cells are data: markup in them is not interpreted."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, show_edge=False, pad_edge=False)
    for column in columns:
        grid.add_column(column)
    for row in rows:
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(grid)
