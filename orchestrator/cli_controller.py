"""`modm controller ...` and `modm workers ...`. Imports nothing heavy until a command runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from modm_tasks.output import handle_errors, note, print_json

controller_app = typer.Typer(no_args_is_help=True, help="The rate controller.", rich_markup_mode=None)
workers_app = typer.Typer(no_args_is_help=True, help="GPU workers and their roles.", rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Worker = Annotated[str, typer.Argument(help="Node name, e.g. gpu0@host; `modm workers list` shows them.")]


@controller_app.command("run")
@handle_errors
def run(
    allocation: Annotated[str | None, typer.Option(help="static | modm-quality | modm-throughput | slo.")] = None,
    variant: Annotated[str | None, typer.Option(help="paper | code: where the two differ.")] = None,
    period_s: Annotated[float | None, typer.Option(min=0.1, help="Seconds between decisions.")] = None,
    static_large: Annotated[int | None, typer.Option(min=0, help="Large workers under --allocation static.")] = None,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Prometheus port; 0 = off.")] = None,
) -> None:
    """Run the controller until told to stop. Several may run; one leads."""
    import signal

    from modm_tasks.logs import configure
    from modm_tasks.settings import load_settings
    from orchestrator.controller.decide import check_allocation
    from orchestrator.controller.loop import Controller
    from orchestrator.controller.prices import profiled

    given = {
        "allocation": allocation,
        "variant": variant,
        "period_s": period_s,
        "static_large": static_large,
        "metrics_port": metrics_port,
    }
    settings = load_settings(controller={name: value for name, value in given.items() if value is not None})
    check_allocation(settings.controller.allocation)
    profiled(settings)  # a wrong profile is told now, not at the first decision
    configure(settings, "controller")
    controller = Controller.from_settings(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: controller.stop())
    controller.run()


@controller_app.command("explain")
@handle_errors
def explain(
    as_json: Json = False,
    last: Annotated[int, typer.Option(min=1, max=10_000, help="How many decisions.")] = 5,
) -> None:
    """Why the workers have the roles they have: inputs, candidates, scores and choice of the last decisions."""
    answer = _get("/v1/controller/explain", last=last)
    if as_json:
        print_json(answer)
        return
    from orchestrator.controller.show import explained

    typer.echo(explained(answer))


@workers_app.command("list")
@handle_errors
def list_workers(as_json: Json = False) -> None:
    """Every worker: wanted role, role in force, state, what it draws."""
    rows = _get("/v1/workers")
    if as_json:
        print_json(rows)
        return
    from orchestrator.controller.show import worker_table

    typer.echo(worker_table(rows))


@workers_app.command("assign")
@handle_errors
def assign(
    worker: Worker,
    role: Annotated[str, typer.Argument(help="large | small | auto; auto gives it back to the controller.")],
    as_json: Json = False,
) -> None:
    """Pin a worker to a role; the controller then plans around it."""
    from modm_tasks.errors import InvalidInputError

    if role not in {"large", "small", "auto"}:
        raise InvalidInputError(f"role must be large, small or auto, not {role!r}", field="role")
    _post(worker, "role", as_json, {"role": role})


@workers_app.command("drain")
@handle_errors
def drain(worker: Worker, as_json: Json = False) -> None:
    """Let a worker finish what it draws and take nothing more."""
    _post(worker, "drain", as_json)


@workers_app.command("resume")
@handle_errors
def resume(worker: Worker, as_json: Json = False) -> None:
    """Undo a drain."""
    _post(worker, "resume", as_json)


def _get(path: str, **params: Any) -> Any:
    from modm_tasks.client import Client
    from modm_tasks.settings import load_settings

    with Client.from_settings(load_settings()) as client:
        return client.get(path, **params)


def _post(worker: str, what: Literal["role", "drain", "resume"], as_json: bool, body: Any = None) -> None:
    from urllib.parse import quote

    from modm_tasks.client import Client
    from modm_tasks.settings import load_settings

    with Client.from_settings(load_settings()) as client:
        answer = client.post(f"/v1/workers/{quote(worker, safe='@')}/{what}", json=body)
    if as_json:
        print_json(answer)
        return
    held = [word for word in ("pinned", "drained") if answer[word]]
    note(f"{worker}: {answer['role']}{' (' + ', '.join(held) + ')' if held else ''}, in force within a second")
