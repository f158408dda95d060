"""`python -m ops.chaos`. Exit status 0, or 4 when something was lost, doubled or left broken."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from modm_tasks.errors import GateError
from modm_tasks.output import handle_errors, note
from ops.chaos.rig import Rig
from ops.chaos.run import Chaos, Outcome
from ops.chaos.schedule import FAULTS
from ops.demo import TRACE

ENGINES = {
    "fake": {"MODM_WORKER__ENGINE": "fake", "MODM_EMBEDDER": "fake"},
    "diffusers": {"MODM_WORKER__DEVICE": "cpu"},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The short form is what the tests run: each fault once, two workers."""
    parser = argparse.ArgumentParser(prog="python -m ops.chaos", description="Break everything in turn, then count.")
    parser.add_argument("--short", action="store_true", help="each fault once, 100 requests, two workers")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="how often each fault is injected")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="fake")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--home", type=Path, default=Path(".modm/chaos"))
    parser.add_argument("--output", type=Path, help="write the table to this page, e.g. docs/chaos.md")
    given = parser.parse_args(argv)
    if given.short:
        given.requests, given.rounds, given.workers = 100, 1, 2
    return given


def prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in TRACE.read_text().splitlines()]


def page(outcome: Outcome, given: argparse.Namespace) -> str:
    """The result as a page for the docs."""
    verdict = outcome.verdict
    rows = [
        f"| {text} | {len(times)} | {sorted(times)[len(times) // 2]:.1f} | {max(times):.1f} |"
        for name, text in FAULTS.items()
        if (times := outcome.recovery_s.get(name))
    ]
    counts = [f"| {name.replace('_', ' ')} | {value} |" for name, value in verdict.model_dump().items()]
    command = f"make chaos CHAOS_ARGS='--requests {given.requests} --rounds {given.rounds} --workers {given.workers}"
    return "\n".join(
        [
            "# What was broken, and what came of it",
            "",
            f"`{command} --engine {given.engine} --seed {given.seed} --output docs/chaos.md'`, "
            f"{os.cpu_count()} cores, {platform.machine()}, no GPU, {outcome.took_s:.0f} s. A supervisor starts dead "
            "processes again, as systemd or Compose would. Besides the faults below: the message of every tenth request "
            f"was sent twice ({outcome.duplicates} in all), and prompts that kill their worker each time were mixed in. "
            f"{outcome.restarts} restarts of processes; clients repeated a call {outcome.outages} times.",
            "",
            "| fault | injected | seconds until whole again, median | longest |",
            "|---|---|---|---|",
            *rows,
            "",
            "*Whole*: the orchestrator takes work and every worker is ready; a worker's start is included.",
            "",
            "| afterwards | |",
            "|---|---|",
            *counts,
            "",
            "Not injected: a full disk, skewed clocks (all times are Redis' own), a cut between two hosts.",
            "",
        ]
    )


@handle_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the table, and judge."""
    given = parse(argv)
    home = given.home.absolute()
    if (home / "redis").exists():
        shutil.rmtree(home)
    rig = Rig(home, {**os.environ, **ENGINES[given.engine]}, workers=given.workers)
    try:
        rig.start()
        chaos = Chaos(rig=rig, prompts=prompts(), requests=given.requests, rounds=given.rounds, seed=given.seed)
        outcome = chaos.run()
    finally:
        rig.stop()
    text = page(outcome, given)
    typer.echo(text)
    if given.output is not None:
        given.output.write_text(text)
        note(f"written: {given.output}")
    if not outcome.verdict.clean:
        raise GateError(f"chaos: {outcome.verdict}")


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as done:
        sys.exit(done.exit_code)
