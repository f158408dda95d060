"""`modm keys add | list | revoke`: API keys, in the file that the orchestrator reads."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from modm_tasks.output import handle_errors, note, print_json, table

keys_app = typer.Typer(no_args_is_help=True, help="API keys.", rich_markup_mode=None)


def _file() -> Any:
    from modm_tasks.settings import load_settings
    from orchestrator.auth import KeyFile, keys_path

    return KeyFile(keys_path(load_settings()))


@keys_app.command()
@handle_errors
def add(
    client: Annotated[str, typer.Argument(help="Name of the client; its requests carry it.")],
    scope: Annotated[list[str] | None, typer.Option(help="submit | read | admin; may be repeated.")] = None,
    requests_per_min: Annotated[int, typer.Option(min=0, help="Rate limit; 0 = the service's.")] = 0,
) -> None:
    """Make a key. It is printed once and stored nowhere."""
    from modm_tasks.errors import InvalidInputError
    from orchestrator.auth import SCOPES

    scopes = scope or ["submit", "read"]
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise InvalidInputError(f"unknown scope {unknown[0]!r}; there are {', '.join(SCOPES)}", field="scope")
    typer.echo(_file().add(client, scopes, requests_per_min=requests_per_min))
    note("keep it: only its hash is stored")


@keys_app.command("list")
@handle_errors
def list_(json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Clients, scopes and limits; never keys."""
    keys = _file().load()
    if json:
        print_json([k.model_dump(exclude={"digest"}) for k in keys])
        return
    days = [f"{(time.time() - k.created_s) / 86_400:.1f}" for k in keys]
    rows = [(k.client, ", ".join(k.scopes), k.requests_per_min or "-", d) for k, d in zip(keys, days, strict=True)]
    table(("client", "scopes", "per minute", "age days"), rows)


@keys_app.command()
@handle_errors
def revoke(client: Annotated[str, typer.Argument(help="Name of the client.")]) -> None:
    """Remove all keys of a client; they stop working at the next call."""
    typer.echo(f"{_file().revoke(client)} keys revoked")
