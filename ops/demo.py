"""`make demo`: the bundled trace through the large model alone, then through MoDM, on a stack of its own.

It uses the system as its users do: the `modm` command and the HTTP API. Closed loop, because MoDM finds finished images
only: with everything offered at once to a cold cache there is nothing to find.

Exit status: 0, or 4 when MoDM is less than 1.8 times as fast as the large model alone or a request was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modm_tasks.errors import ConfigError, GateError, ModmError
from modm_tasks.output import handle_errors, note
from modm_tasks.settings import Settings, load_settings

SCENES = Path(__file__).parent / "scenes" / "data"
TRACE, WARM_CACHE = SCENES / "trace.jsonl", SCENES / "warm-cache"
MIN_SPEEDUP = 1.8
REQUESTS, ROLE_REQUESTS, CONCURRENCY = 120, 40, 2
MODM = (sys.executable, "-m", "orchestrator.cli")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One replay of the trace. ``warm`` starts from the imported cache; each has a cache namespace of its own."""

    name: str
    policy: str
    requests: int
    warm: bool = True
    options: tuple[str, ...] = ()


def demo_environ(environ: Mapping[str, str], home: Path, engine: str) -> dict[str, str]:
    """The caller's environment without MODM_ settings, so that the demo is the same for everybody and meets no other
    stack: a home of its own, a Redis of its own, any free port.
    """
    kept = {k: v for k, v in environ.items() if not k.startswith("MODM_")}
    ours = {
        "MODM_HOME": str(home),
        "MODM_CONFIG": str(home / "modm.toml"),
        "MODM_API__PORT": "0",
        "MODM_WORKER__ENGINE": engine,
        "MODM_WORKER__DEVICE": "cpu",
        # Roles are to move within a run of half a minute, so the controller looks at the last 20 s, not the last 180.
        "MODM_CONTROLLER__PERIOD_S": "5",
        "MODM_CONTROLLER__WINDOW_S": "20",
        "MODM_CONTROLLER__BUCKET_S": "2",
    }
    return kept | ours | ({"MODM_EMBEDDER": "fake"} if engine == "fake" else {})


class Demo:
    """The steps, each a command."""

    def __init__(self, home: Path, *, engine: str, requests: int) -> None:
        self.home, self.requests = home, requests
        self.reports = home / "report"
        self.environ = demo_environ(os.environ, home, engine)
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        note(f"[{time.monotonic() - self.began:5.1f} s] {text}")

    def modm(self, *args: str) -> None:
        """Run one command with its progress on our stderr. Raises ModmError with its exit code."""
        self.say("modm " + " ".join(_shown(a) for a in args))
        done = subprocess.run([*MODM, *args], env=self.environ, stdout=sys.stderr, check=False)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise ModmError(f"`modm {args[0]}` ended with status {done.returncode}; logs in {self.home / 'logs'}")

    def settings(self) -> Settings:
        return load_settings(home=self.home)

    def replay(self, run: Run) -> dict[str, Any]:
        folder = self.reports / run.name
        warm = ["--cache-directory", str(WARM_CACHE)] if run.warm else []
        self.modm(
            *("submit-trace", str(TRACE), "--arrivals", "closed", "--concurrency", str(CONCURRENCY)),
            *("--num-requests", str(run.requests), "--policy", run.policy, "--namespace", f"demo-{run.name}"),
            *(*warm, *run.options, "--name", run.name, "--report", str(folder)),
        )
        from orchestrator.report.write import read_report

        return read_report(folder)

    def control(self, **changes: object) -> None:
        """Change the running controller, and say so."""
        from modm_tasks.client import Client

        self.say(f"PUT /v1/control {json.dumps(changes)}")
        with Client.from_settings(self.settings()) as client:
            client.put("/v1/control", json=changes)

    def run(self) -> dict[str, Any]:
        self.modm("up", "--workers", "2")  # allocation `slo`, which pools the roles of workers that hold both models
        large = self.replay(Run(name="large-only", policy="large-only", requests=self.requests, warm=False))
        pooled = self.replay(Run(name="modm", policy="modm", requests=self.requests))
        # The published roles: both workers begin as large ones, as in the paper's artefact, and the controller moves
        # them by what it sees.
        self.control(mode="roles", allocation="static", static_large=2)
        options = ("--workers", "roles", "--allocation", "modm-throughput")
        few = min(self.requests, ROLE_REQUESTS)
        roles = self.replay(Run(name="modm-roles", policy="modm", requests=few, options=options))
        return self.compare(large, pooled, roles)

    def compare(self, large: dict[str, Any], pooled: dict[str, Any], roles: dict[str, Any]) -> dict[str, Any]:
        from modm_tasks.output import table
        from orchestrator.report import tables
        from orchestrator.report.build import comparison
        from orchestrator.report.write import read_latencies, read_sheet, write_comparison

        reports = [large, pooled, roles]
        names = tables.names(reports)
        figures = comparison(large, pooled)
        with_roles = comparison(large, roles)
        figures |= {"roles": {"speedup": with_roles["speedup"], "role_moves": roles["role_moves"]}}
        figures["lost"] += roles["requests"]["lost"]
        sheet = read_sheet(self.reports / "modm")
        write_comparison(
            self.reports,
            reports,
            figures,
            latencies={name: read_latencies(self.reports / name) for name in names},
            sheets={} if sheet is None else {"modm": sheet},
            lead=verdict(figures),
            title="MoDM demo: the large model alone, and MoDM",
        )
        table(["", *names], tables.rows(reports))
        return figures


def _shown(arg: str) -> str:
    return os.path.relpath(arg) if os.path.isabs(arg) else arg


def verdict(figures: Mapping[str, Any]) -> str:
    """One sentence for people."""
    speedup, roles = figures["speedup"], figures["roles"]
    return (
        f"MoDM serves {speedup:.2f} times as many images a minute as the large model alone "
        f"(published roles: {roles['speedup']:.2f} times, {roles['role_moves']} role moves); {figures['lost']} lost."
    )


def check_gate(figures: Mapping[str, Any], *, min_speedup: float = MIN_SPEEDUP) -> None:
    """Raises GateError that names what was missed."""
    missed = []
    if figures["speedup"] is None or figures["speedup"] < min_speedup:
        missed.append(f"speed-up {figures['speedup']} is below {min_speedup}")
    lost = [
        f"{name}: {requests['submitted'] - requests['done']} of {requests['submitted']} not done"
        for name in ("large_only", "modm")
        if (requests := figures[name]["requests"])["done"] != requests["submitted"]
    ]
    if figures["lost"] or lost:
        missed.append(f"{figures['lost']} requests lost; {'; '.join(lost)}")
    if figures["roles"]["role_moves"] < 1:
        missed.append("the published roles show no role move")
    if missed:
        raise GateError("; ".join(missed))


def fresh_home(home: Path) -> Path:
    """An empty folder for this run; only what an earlier demo made is removed."""
    from ops import stack

    home = home.absolute()
    stack.down(home, grace_s=10, say=note)
    if home.exists():
        if any(home.iterdir()) and not (home / "stack.lock").exists():
            raise ConfigError(f"{home} holds something that is no demo; choose another --home", field="home")
        shutil.rmtree(home)
    home.mkdir(parents=True)
    return home


@handle_errors
def demo(argv: Sequence[str] | None = None) -> None:
    """Run it. Raises typer.Exit with the exit code where it fails."""
    from ops import stack

    parser = argparse.ArgumentParser(prog="python -m ops.demo", description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(".modm/demo"), help="state and reports of the demo")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests of the two compared runs")
    parser.add_argument(
        "--engine", choices=["diffusers", "fake"], default="diffusers", help="fake: no models, for tests"
    )
    given = parser.parse_args(argv)
    work = Demo(fresh_home(given.home), engine=given.engine, requests=given.requests)
    try:
        figures = work.run()
    finally:
        work.say("stopping the stack")
        stack.down(work.home, grace_s=20, say=note)
    note(verdict(figures))
    note(f"report: {_shown(str(work.reports / 'index.html'))}")
    check_gate(figures)


if __name__ == "__main__":
    import typer

    try:
        demo()
    except typer.Exit as done:
        sys.exit(done.exit_code)
