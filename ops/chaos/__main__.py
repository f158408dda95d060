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
from ops.chaos.verify import COUNTS
from ops.demo import TRACE
from ops.stack import gpu_count

ENGINES = {
    "fake": {"MODM_WORKER__ENGINE": "fake", "MODM_EMBEDDER": "fake"},
    "diffusers": {"MODM_WORKER__DEVICE": "cpu"},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The short form is what the tests run: each fault once, two workers."""
    parser = argparse.ArgumentParser(prog="python -m ops.chaos", description="Break everything in turn, then count.")
    parser.add_argument(
        "--short", action="store_true", help="each fault once, 60 requests, one poison prompt, two workers"
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="how often each fault is injected")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--poison", type=int, default=10, help="prompts that kill the child that draws them")
    parser.add_argument("--seconds", type=float, default=1800.0, help="no further fault or request after so long")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="fake")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--home", type=Path, default=Path(".modm/chaos"))
    parser.add_argument("--output", type=Path, help="write the table to this page, e.g. docs/chaos.md")
    given = parser.parse_args(argv)
    if given.short:
        given.requests, given.rounds, given.workers, given.poison = 60, 1, 2, 1
    return given


def prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in TRACE.read_text().splitlines()]


def machine() -> str:
    """Cores and processor family, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()}-core {name}, {gpu_count() or 'no'} GPU"


def page(outcome: Outcome, given: argparse.Namespace) -> str:
    """The result as a page for the docs."""
    verdict = outcome.verdict
    rows = [
        f"| {text} | {len(times)} | {sorted(times)[len(times) // 2]:.1f} | {max(times):.1f} |"
        for name, text in FAULTS.items()
        if (times := outcome.recovery_s.get(name))
    ]
    counts = [
        f"| {name.replace('_', ' ')} | {value}{'' if name in COUNTS or not value else ' (should be 0)'} |"
        for name, value in verdict.model_dump().items()
    ]
    command = (
        f"make chaos CHAOS_ARGS='--requests {given.requests} --rounds {given.rounds} --workers {given.workers} "
        f"--poison {given.poison}"
    )
    return "\n".join(
        [
            "# What was broken, and what came of it",
            "",
            f"`{command} --engine {given.engine} --seed {given.seed} --output docs/chaos.md'`, "
            f"{machine()}, {outcome.took_s:.0f} s. A supervisor starts dead "
            "processes again, as systemd or Compose would. Besides the faults below: the message of every tenth request "
            f"was sent twice ({outcome.duplicates} in all), and prompts that kill their worker each time were mixed in. "
            f"{outcome.restarts} restarts of processes; clients repeated a call {outcome.outages} times"
            f"{f', of these {len(outcome.errors)} after an answer that says not to' if outcome.errors else ''}.",
            "",
            "| fault | injected | seconds to recover, median | longest |",
            "|---|---|---|---|",
            *rows,
            "",
            "Recovered: the orchestrator takes work, every process runs, every worker is ready (its start is included), and "
            "a request has ended since.",
            "",
            "| afterwards | |",
            "|---|---|",
            *counts,
            "",
            "*computed twice* is allowed; *stored* are repeats answered with a stored image; *damaged* are the images that "
            "the run broke itself. All rows below *computed twice* have to be 0, or the exit status is 4.",
            "",
            "The plan is a function of the seed and is paced by finished requests. Leases last 2 s and a request has 6 "
            "attempts here, because a request that is near many faults within seconds must not be taken for poison; "
            "with the defaults (15 s, 3 attempts) a killed worker's request waits longer.",
            "",
            "Not injected: a full disk (it needs a quota or a file system of its own), skewed clocks (all times are "
            "Redis' own), a cut between two hosts (network namespaces need privileges). With `--engine fake` "
            "the pictures are a test double's; `--engine diffusers` draws with the bundled models.",
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
        outcome = Chaos(
            rig=rig,
            prompts=prompts(),
            requests=given.requests,
            rounds=given.rounds,
            seed=given.seed,
            poison=given.poison,
            limit_s=given.seconds,
            kill_poisoned=given.engine != "fake",
        ).run()
    finally:
        left = rig.stop()
    if left:
        outcome.verdict = outcome.verdict.model_copy(update={"orphans": left})
    text = page(outcome, given)
    typer.echo(text)
    if given.output is not None:
        given.output.write_text(text)
        note(f"written: {given.output}")
    if not outcome.verdict.clean:
        raise GateError(f"chaos: should be 0: {outcome.verdict.missed}")


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as done:
        sys.exit(done.exit_code)
