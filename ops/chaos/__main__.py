"""`python -m ops.chaos`. Exit status 0, or 4 when something was lost, doubled or left broken."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from modm_tasks.errors import GateError
from modm_tasks.output import handle_errors, note
from ops.chaos.page import page
from ops.chaos.rig import Rig
from ops.chaos.run import Chaos
from ops.demo import TRACE


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What suits an engine and its embedder. Scores and similarities are cosines.

    ``verify_floor``: so high that many refined images are below it. ``picky``: what choosy prompts ask of an image.
    ``twin``: what is predicted of an image of the same words only, and of no other.
    """

    environ: dict[str, str]
    verify_floor: float
    picky: float
    twin: float


ENGINES = {
    # The test double's images score 1 all, so no floor below that would have one drawn again.
    "fake": Tuning(
        environ={"MODM_WORKER__ENGINE": "fake", "MODM_EMBEDDER": "fake"}, verify_floor=1.5, picky=0.9, twin=0.99
    ),
    # Real models of three workers on two cores: a lease has to outlive a moment without a turn.
    "scenes": Tuning(
        environ={"MODM_WORKER__DEVICE": "cpu", "MODM_WORKER__LEASE_S": "4"}, verify_floor=0.7, picky=0.7, twin=0.74
    ),
}
#: Share of hits that may be drawn again.
ESCALATION_RATE = 0.2
#: The short form is what the tests run: each fault once, by the test double, two workers.
SHORT = {"requests": 60, "rounds": 1, "workers": 2, "poison": 2, "engine": "fake"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ops.chaos", description="Break everything in turn, then count.")
    parser.add_argument(
        "--short", action="store_true", help="each fault once, 60 requests, two workers, the fake engine"
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault is injected")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--poison", type=int, default=10, help="prompts that kill the child that draws them")
    parser.add_argument("--steps", type=int, default=10, help="of each image, so that a run is bounded on a laptop")
    parser.add_argument("--seconds", type=float, default=1800.0, help="no further fault or request after so long")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="scenes")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--home", type=Path, default=Path(".modm/chaos"))
    parser.add_argument("--output", type=Path, help="write the table to this page, e.g. docs/chaos.md")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    if "--short" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SHORT)
    return parser.parse_args(argv)


def command_of(given: argparse.Namespace) -> str:
    """The arguments that make the same run again."""
    names = ("requests", "rounds", "workers", "poison", "steps", "engine", "seed")
    return " ".join(f"--{name} {getattr(given, name)}" for name in names) + " --output docs/chaos.md"


def prompts() -> list[str]:
    """Each once: what repeats is up to the traffic."""
    return list(dict.fromkeys(json.loads(line)["prompt"] for line in TRACE.read_text().splitlines()))


@handle_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the table, and judge."""
    given = parse(argv)
    # What ends a run from outside still finds its processes, its disk and its network removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    home = given.home.absolute()
    for name in ("drawn", "images", "logs", "redis", "vectors", "workers"):
        shutil.rmtree(home / name, ignore_errors=True)
    tuning = ENGINES[given.engine]
    rig = Rig(home, {**os.environ, **tuning.environ}, workers=given.workers)
    try:
        rig.start()
        outcome = Chaos(
            rig=rig,
            prompts=prompts(),
            requests=given.requests,
            rounds=given.rounds,
            seed=given.seed,
            poison=given.poison,
            steps=given.steps,
            picky=tuning.picky,
            twin=tuning.twin,
            escalation={"verify_floor": tuning.verify_floor, "escalation_rate": ESCALATION_RATE},
            limit_s=given.seconds,
        ).run()
    finally:
        left = rig.stop()
        rig.remove()
    if left:
        outcome.verdict = outcome.verdict.model_copy(update={"orphans": left})
    if given.json is not None:
        given.json.write_text(json.dumps(outcome.as_json(), indent=1))
    text = page(outcome, command_of(given), lease_s=rig.settings.worker.lease_s, limits=rig.limits)
    typer.echo(text)
    if given.output is not None:
        given.output.write_text(text)
        note(f"written: {given.output}")
    if not outcome.verdict.clean:
        raise GateError(f"chaos: should be 0: {outcome.verdict.missed}; never: {outcome.exercised.never}")


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as done:
        sys.exit(done.exit_code)
