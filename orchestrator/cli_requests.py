"""`modm requests ...`: what became of requests, and the dead-letter list."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from modm_tasks.output import handle_errors, note, print_json, table

requests_app = typer.Typer(no_args_is_help=True, help="Requests and their decisions.", rich_markup_mode=None)
Id = Annotated[str, typer.Argument(help="Request id.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


def _client() -> Any:
    from modm_tasks.client import Client
    from modm_tasks.settings import load_settings

    return Client.from_settings(load_settings())


def _show_list(records: list[dict[str, Any]]) -> None:
    now = time.time()
    rows = []
    for r in records:
        decision, latency = r["decision"] or {}, None
        if r["done_s"] is not None:
            latency = f"{r['done_s'] - r['arrival_s']:.2f}"
        prompt = r["error"] or r["request"]["prompt"]
        rows.append(
            (r["id"], r["state"], decision.get("route"), decision.get("skipped_steps"), latency,
             f"{now - r['accepted_s']:.0f}", prompt[:70])
        )  # fmt: skip
    table(("id", "state", "route", "k", "latency s", "age s", "prompt or error"), rows)


@requests_app.command("list")
@handle_errors
def list_(
    state: Annotated[str | None, typer.Option(help="Only this state.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    json: Json = False,
) -> None:
    """Newest first."""
    with _client() as http:
        records = http.get("/v1/requests", state=state, client=client, limit=limit)
    if json:
        print_json(records)
    else:
        _show_list(records)


@requests_app.command()
@handle_errors
def show(request_id: Id) -> None:
    """Everything the ledger knows of a request, as JSON."""
    with _client() as http:
        print_json(http.get(f"/v1/requests/{request_id}"))


@requests_app.command()
@handle_errors
def explain(request_id: Id, json: Json = False) -> None:
    """Why a request was routed as it was: source, similarities, k, waiting, escalation, every transition."""
    with _client() as http:
        answer = http.get(f"/v1/requests/{request_id}/explain")
    if json:
        print_json(answer)
        return
    record = answer["record"]
    decision, done = record["decision"] or {}, record["completion"] or {}
    first = answer["transitions"][0]["at_s"] if answer["transitions"] else 0.0
    rows: list[tuple[str, object]] = [
        ("prompt", record["request"]["prompt"]),
        ("state", record["state"] + (f" ({record['error']})" if record["error"] else "")),
        ("policy", decision.get("policy")),
        ("route", decision.get("route")),
        ("why", decision.get("reason")),
        ("source", decision.get("source_id")),
        ("similarity", _four(decision.get("similarity"))),
        ("predicted similarity", _four(decision.get("predicted_similarity"))),
        ("skipped steps k", decision.get("skipped_steps")),
        ("waits on", answer["waits_on"]),
        ("waited on", ", ".join(i for i in answer["waited_on"] if i != answer["waits_on"]) or None),
        ("waited s", answer["waited_s"]),
        ("others wait on it", ", ".join(answer["waiters"]) or None),
        ("position in queue", answer["position"]),
        ("verified against", _floor(decision.get("verify_floor"))),
        ("escalated", _escalated(answer["refined_first"])),
        ("model", done.get("model")),
        ("steps run", done.get("steps_run")),
        ("CLIP score", _four(record["clip_score"])),
        ("attempts", record["attempt"]),
    ]
    for name, value in rows:
        if value is not None:
            typer.echo(f"{name:<22}{value}")
    typer.echo("transitions")
    for step in answer["transitions"]:
        typer.echo(f"  +{step['at_s'] - first:8.3f} s  {step['state']:<10}{step['note']}".rstrip())


def _four(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _floor(floor: float | None) -> str | None:
    """The floor of a hit's rung; -1 = no rung of the ladder has one there."""
    return None if floor is None else f"{floor:g}" if floor >= 0 else "no floor is calibrated"


def _escalated(first: dict[str, Any] | None) -> str:
    if first is None:
        return "no"
    return f"yes: {first['model']}, {first['skipped_steps']} steps skipped, scored {first['clip_score']:.4f}"


@requests_app.command()
@handle_errors
def cancel(request_id: Id) -> None:
    """Cancel: at once, or at the next step where it is being drawn."""
    with _client() as http:
        typer.echo(http.post(f"/v1/requests/{request_id}/cancel")["state"])


@requests_app.command()
@handle_errors
def failed(limit: Annotated[int, typer.Option(min=1, max=1000)] = 50, json: Json = False) -> None:
    """The dead-letter list: requests whose attempts are spent, with their last error."""
    with _client() as http:
        records = http.get("/v1/requests", state="failed", limit=limit)
    if json:
        print_json(records)
    else:
        _show_list(records)


@requests_app.command()
@handle_errors
def retry(
    request_id: Annotated[str | None, typer.Argument(help="Request id.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every failed request.")] = False,
) -> None:
    """Start failed requests again."""
    from modm_tasks.errors import InvalidInputError

    if (request_id is None) == (not all_):
        raise InvalidInputError("give one request id, or --all", field="request_id")
    with _client() as http:
        ids = [r["id"] for r in http.get("/v1/requests", state="failed", limit=1000)] if all_ else [request_id]
        for one in ids:
            http.post(f"/v1/requests/{one}/retry")
    typer.echo(f"{len(ids)} started again")


@requests_app.command()
@handle_errors
def purge(
    request_id: Annotated[str | None, typer.Argument(help="Request id.")] = None,
    failed_: Annotated[bool, typer.Option("--failed", help="Every failed request.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Forget finished requests. Cached images stay; `modm cache purge` removes those."""
    from modm_tasks.errors import InvalidInputError

    if (request_id is None) == (not failed_):
        raise InvalidInputError("give one request id, or --failed", field="request_id")
    with _client() as http:
        ids = [r["id"] for r in http.get("/v1/requests", state="failed", limit=1000)] if failed_ else [request_id]
        if not yes and ids and not typer.confirm(f"forget {len(ids)} requests?"):
            note("nothing done")
            return
        for one in ids:
            http.delete(f"/v1/requests/{one}")
    typer.echo(f"{len(ids)} forgotten")
