"""`modm status [--watch]`: the live view of a running system."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from modm_tasks.output import handle_errors, print_json

EVERY_S = 1.0


@handle_errors
def status_command(
    watch: Annotated[bool, typer.Option("--watch", help="Redraw every second until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Workers, roles, resident models, queues, hit rate, SLO."""
    from modm_tasks.client import Client
    from modm_tasks.settings import load_settings

    with Client.from_settings(load_settings()) as client:
        answer = client.get("/v1/status")
        if json:
            print_json(answer)
        elif watch:
            _watch(client, answer)
        else:
            from rich.console import Console

            Console(highlight=False).print(render(answer))


def _watch(client: Any, answer: Mapping[str, Any]) -> None:
    from rich.live import Live

    pause = threading.Event()
    with Live(render(answer), auto_refresh=False, screen=False) as live:
        while not pause.wait(EVERY_S):
            live.update(render(client.get("/v1/status")), refresh=True)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def render(status: Mapping[str, Any]) -> Any:
    """The view as a rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    counts, window, health = status["counts"], status["window"], status["health"]
    minutes = status["window_s"] / 60
    head = Text(f"MoDM {status['version']} at {status.get('url', '')}, up {status['uptime_s']:.0f} s, ")
    head.append(
        "ready" if health["ready"] else "; ".join(health["problems"]), style="green" if health["ready"] else "red"
    )
    figures = Table(show_header=False, box=None, pad_edge=False)
    rows = (
        ("policy", f"{status['policy']}, workers {status['mode']}"),
        ("models", f"{status['models']['large']} / {status['models']['small']}"),
        ("requests", ", ".join(f"{counts[n]} {n}" for n in ("open", "running", "waiting", "failed"))),
        ("queues", f"large-gen {counts['ready:large-gen']}, small-refine {counts['ready:small-refine']}, "
                   f"{status['backlog_s']:.1f} s of work"),
        (f"last {minutes:.0f} min", f"{window.get('arrivals', 0) / minutes:.1f} arrivals and "
                                    f"{window.get('done', 0) / minutes:.1f} images a minute"),
        ("hit rate", _share(status["hit_rate"])),
        ("SLO", f"{_share(status['slo']['met'])} within {status['slo']['multiple']:g}x of "
                f"{status['slo']['large_latency_s']:.2f} s"),
        ("cache", ", ".join(f"{n}: {c}" for n, c in status["cache"].items()) or "empty"),
    )  # fmt: skip
    for name, value in rows:
        figures.add_row(Text(name, style="bold"), Text(value))
    workers = Table(box=None, pad_edge=False)
    for column in ("worker", "role", "models", "busy with", "state"):
        workers.add_column(column)
    for worker in status["workers"]:
        workers.add_row(
            worker["worker"], worker.get("role") or "-", ", ".join(worker["models"]), worker["busy_with"] or "idle",
            worker["unwell"] or "ready",
        )  # fmt: skip
    return Group(head, figures, workers)
