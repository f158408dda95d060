"""One chaos run: load and faults side by side, then the count."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modm_tasks.app import make_app
from modm_tasks.errors import ModmError
from modm_tasks.output import note
from modm_tasks.queues import TASK_OF_QUEUE
from ops.chaos.faults import Faults
from ops.chaos.load import Load
from ops.chaos.mechanisms import BY_FAULTS, Exercised, exercised
from ops.chaos.rig import Rig
from ops.chaos.schedule import plan, share
from ops.chaos.verify import Seen, Verdict, gather, idle_workers, judge
from ops.chaos.watch import Growth, Watch

#: Longest wait for the stack to be whole and for a request to end after a fault. A fault without is "not recovered".
RECOVERY_S = 240.0
#: How much longer the load goes on where a mechanism has not taken part yet.
EXTRA_S = 60.0


@dataclass(kw_only=True)
class Outcome:
    """``recovery_s``: of each fault, the seconds from its end until the stack was whole and a request had ended again.
    ``grown``: every process that was watched for long enough.
    """

    verdict: Verdict
    exercised: Exercised
    recovery_s: Mapping[str, Sequence[float]]
    duplicates: int
    restarts: int
    outages: int
    errors: Sequence[str]
    grown: Sequence[Growth]
    left_out: Sequence[str]
    took_s: float

    def as_json(self) -> dict[str, Any]:
        """Every figure."""
        plain = {name: getattr(self, name) for name in ("duplicates", "restarts", "outages", "took_s")}
        return plain | {
            "verdict": self.verdict.model_dump(),
            "exercised": self.exercised.model_dump(),
            "recovery_s": {name: list(times) for name, times in self.recovery_s.items()},
            "errors": list(self.errors),
            "left_out": list(self.left_out),
            "processes": [one.model_dump() for one in self.grown],
        }


@dataclass
class Chaos:
    """``requests`` is the least; the load goes on until every fault has been injected or ``limit_s`` is over."""

    rig: Rig
    prompts: Sequence[str]
    requests: int
    rounds: int
    seed: int
    poison: int = 10
    users: int = 8
    steps: int | None = None
    picky: float | None = None
    twin: float | None = None
    escalation: Mapping[str, float] = field(default_factory=dict)
    limit_s: float = float("inf")

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.all_exercised = False
        self.injected = self.duplicates = self.unrecovered = 0
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self.load = Load(
            self.rig.url, self.prompts, users=self.users, enough=self._enough, seed=self.seed, steps=self.steps,
            picky=self.picky,
        )  # fmt: skip
        self.faults = Faults(self.rig, self.load, random.Random(self.seed), escalation=self.escalation, twin=self.twin)
        self.plan = plan(self.seed, rounds=self.rounds, requests=self.requests, without=self.faults.without())
        self.watch = Watch(self.rig.pids, time.monotonic)
        self._over = threading.Event()

    def _late(self) -> bool:
        return time.monotonic() - self.began > self.limit_s

    def _enough(self, sent: int) -> bool:
        return self._late() or (sent >= self.requests and self.injected == len(self.plan) and self.all_exercised)

    def run(self) -> Outcome:
        load = threading.Thread(target=self.load.run, name="load")
        twice = threading.Thread(target=self._duplicate, name="duplicates")
        self.watch.start()
        self.faults.escalate(self.escalation)
        for thread in (load, twice):
            thread.start()
        try:
            self._inject_all()
            self.rig.soon(self._exercised_all, EXTRA_S)
            self.all_exercised = True
            self.rig.soon(lambda: not load.is_alive(), 600.0)
            with contextlib.suppress(ModmError):
                self.faults.unpin()
            ended = self.rig.soon(self.rig.whole, RECOVERY_S) is not None
            ended = self.rig.soon(self._settled, RECOVERY_S) is not None and ended
        finally:
            self.load.stop()
            self._over.set()
            for thread in (load, twice):
                thread.join()
            grown = self.watch.stop()
        if not ended:
            note("the stack is not whole, or requests are open: counted below")
        return self._outcome(grown)

    def _outcome(self, grown: Sequence[Growth]) -> Outcome:
        tally = self.load.tally
        idle: list[str] = []
        self.rig.soon(lambda: not idle_workers(self.rig.settings, self.rig.live_workers(), into=idle), 30.0)
        seen: Seen = gather(self.rig.ledger, self.rig.client, tally.accepted)
        verdict = judge(
            seen,
            prompts={i: tally.prompts[i] for i in tally.accepted},
            poison=tally.poison,
            poison_again=tally.poison_again,
            damaged=self.faults.damaged,
            cancelled=self.faults.cancelled,
            max_attempts=self.rig.settings.worker.max_attempts,
            limits=self.rig.limits,
        )
        took_part = exercised(seen.records, seen.logs, self.rig.limits, waiting_at_death=self.faults.waiting_at_death)
        return Outcome(
            verdict=verdict.model_copy(
                update={
                    "idle_workers": self.rig.worker_count - len(self.rig.live_workers()) + len(idle),
                    "unrecovered": self.unrecovered,
                    "not_injected": len(self.plan) - self.injected,
                    "growing": sum(not one.flat for one in grown),
                    "not_exercised": len(took_part.never),
                }
            ),
            exercised=took_part,
            recovery_s=dict(self.recovery_s),
            duplicates=self.duplicates,
            restarts=self.rig.restarts,
            outages=tally.outages,
            errors=tally.errors,
            grown=grown,
            left_out=self.rig.left_out,
            took_s=time.monotonic() - self.began,
        )

    def _settled(self) -> bool:
        try:
            counts = self.rig.ledger.counts()
        except ModmError:
            return False
        return counts["open"] == 0 and counts["unadmitted"] == 0

    def _exercised_all(self) -> bool:
        """Whether every mechanism has taken part by now."""
        try:
            records = {r.id: r for r in self.rig.ledger.get_many(list(self.load.tally.accepted))}
            logs = {i: self.rig.ledger.log(i) for i in records}
        except ModmError:
            return False
        now = exercised(records, logs, self.rig.limits, waiting_at_death=self.faults.waiting_at_death)
        # What only a fault brings about comes no more.
        if self._late() or set(now.never) <= BY_FAULTS:
            return True
        self.rig.pause(1.0)
        return False

    def _inject_all(self) -> None:
        tally = self.load.tally
        for due, fault in self.plan:
            self.rig.soon(functools.partial(self._ended, due), 300.0)
            if self._late():
                note(f"time is up after {self.injected} of {len(self.plan)} faults")
                return
            self._inject(fault)
            took_s = self.rig.soon(functools.partial(self._recovered, fault, tally.ended), RECOVERY_S)
            if took_s is None:
                self.unrecovered += 1
                note(f"not whole {RECOVERY_S:g} s after {fault}")
            else:
                self.recovery_s[fault].append(took_s)
                note(f"{self.injected + 1}/{len(self.plan)} {fault}: {took_s:.1f} s; {tally.ended} ended")
            self.injected += 1

    def _inject(self, fault: str) -> None:
        """Raises nothing: a fault that cannot be injected because another one still lasts is tried until it can."""
        poison = share(self.poison, self.rounds, self.injected * self.rounds // max(1, len(self.plan)))
        if self.rig.soon(lambda: self.faults.inject(fault, poison=poison), 60.0) is None:
            note(f"{fault}: could not be injected")

    def _ended(self, due: int) -> bool:
        return self.load.tally.ended >= due or self._late()

    def _recovered(self, fault: str, before: int) -> bool:
        try:
            return self.faults.over(fault) and self.load.tally.ended > before and self.rig.whole()
        except ModmError:
            return False

    def _duplicate(self) -> None:
        """Send the message of every tenth accepted request once more."""
        rng, position = random.Random(self.seed + 1), 0
        with make_app(self.rig.settings) as app:
            while not self._over.wait(0.2):
                while position < len(self.load.tally.accepted):
                    queue = rng.choice(list(TASK_OF_QUEUE))
                    args = [self.load.tally.accepted[position], 0, 0.0]
                    position += 10
                    try:
                        app.send_task(TASK_OF_QUEUE[queue], args=args, queue=queue)
                        self.duplicates += 1
                    except Exception as error:  # kombu raises the transport's own errors while Redis is away
                        note(f"duplicate not sent: {type(error).__name__}")
