"""One chaos run: load and faults side by side, then the count."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modm_tasks.app import make_app
from modm_tasks.errors import ModmError
from modm_tasks.output import note
from modm_tasks.queues import TASK_OF_QUEUE
from ops.chaos.load import Load
from ops.chaos.rig import Rig
from ops.chaos.schedule import schedule
from ops.chaos.verify import Verdict, verify

RECOVERY_S = 90.0


@dataclass(kw_only=True)
class Outcome:
    """``recovery_s``: of each fault, the seconds until the stack was whole again, one entry for each injection."""

    verdict: Verdict
    recovery_s: Mapping[str, Sequence[float]]
    duplicates: int
    restarts: int
    outages: int
    took_s: float


@dataclass
class Chaos:
    """``requests`` is the least; the load goes on until every fault has been injected."""

    rig: Rig
    prompts: Sequence[str]
    requests: int
    rounds: int
    seed: int
    poison: int = 10
    users: int = 8
    damaged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.faults = schedule(self.seed, self.rounds)
        self.injected = 0
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self.duplicates = 0
        poison = [f"[[crash]] poison {n}" for n in range(self.poison)]
        self.load = Load(self.rig.url, self.prompts, poison, users=self.users, enough=self._enough)
        self._over = threading.Event()

    def _enough(self, sent: int) -> bool:
        return sent >= self.requests and self.injected == len(self.faults)

    def run(self) -> Outcome:
        began = time.monotonic()
        background = [threading.Thread(target=t) for t in (self._duplicate, self._poison, self.load.run)]
        for thread in background:
            thread.start()
        try:
            self._inject_all()
            background[-1].join()
        finally:
            self.load.stop()
            self._over.set()
            for thread in background:
                thread.join()
        self.rig.wait(self.rig.whole, RECOVERY_S, "the stack to be whole at the end")
        self.rig.wait(self._settled, RECOVERY_S, "every request to end and be cached")
        tally = self.load.tally
        prompts = {i: tally.prompts[i] for i in tally.accepted}
        verdict = verify(self.rig.ledger, self.rig.client, prompts, poison=tally.poison, damaged=self.damaged)
        return Outcome(
            verdict=verdict,
            recovery_s=dict(self.recovery_s),
            duplicates=self.duplicates,
            restarts=self.rig.restarts,
            outages=tally.outages,
            took_s=time.monotonic() - began,
        )

    def _settled(self) -> bool:
        try:
            counts = self.rig.ledger.counts()
        except ModmError:
            return False
        return counts["open"] == 0 and counts["unadmitted"] == 0

    def _inject_all(self) -> None:
        step = max(1, self.requests // (len(self.faults) + 1))
        for number, fault in enumerate(self.faults):
            self.rig.wait(functools.partial(self._has_ended, (number + 1) * step), 300, f"load before {fault}")
            self._inject(fault)
            took_s = self.rig.wait(self.rig.whole, RECOVERY_S, f"recovery from {fault}")
            self.recovery_s[fault].append(took_s)
            self.injected += 1
            note(
                f"{self.injected}/{len(self.faults)} {fault}: whole after {took_s:.1f} s; {self.load.tally.ended} ended"
            )

    def _has_ended(self, due: int) -> bool:
        return self.load.tally.ended >= due

    def _inject(self, fault: str) -> None:
        rig = self.rig
        if fault == "kill-child":
            rig.kill_child(self.rng.randrange(rig.worker_count))
        elif fault == "kill-worker":
            rig.kill(f"worker{self.rng.randrange(rig.worker_count)}")
        elif fault.startswith("kill-"):
            rig.kill(fault.removeprefix("kill-"))
        elif fault == "drop-connections":
            rig.drop_connections()
        elif fault == "change-roles":
            large = self.rng.randrange(1, rig.worker_count + 1)
            mode = self.rng.choice(["roles", "pooled"])
            rig.client.put("/v1/control", json={"mode": mode, "allocation": "static", "static_large": large})
        else:
            self._damage(fault)

    def _damage(self, fault: str) -> None:
        """Break the newest cached image, which the next prompts are likely to find."""
        entries = rig_entries(self.rig)
        fresh = [e for e in entries if e["id"] not in self.damaged]
        if not fresh:
            return
        chosen = self.rng.choice(fresh[:5])
        self.damaged.add(str(chosen["id"]))
        path = Path(self.rig.settings.image_root, str(chosen["uri"]))
        if fault == "delete-source":
            path.unlink(missing_ok=True)
        elif fault == "truncate-source":
            path.write_bytes(path.read_bytes()[:100])
        else:
            path.write_bytes(self.rng.randbytes(4096))

    def _duplicate(self) -> None:
        """Send the message of every tenth accepted request once more."""
        position = 0
        with make_app(self.rig.settings) as app:
            while not self._over.wait(0.2):
                while position < len(self.load.tally.accepted):
                    queue = self.rng.choice(list(TASK_OF_QUEUE))
                    args = [self.load.tally.accepted[position], 0, 0.0]
                    position += 10
                    try:
                        app.send_task(TASK_OF_QUEUE[queue], args=args, queue=queue)
                        self.duplicates += 1
                    except Exception as error:  # kombu raises the transport's own errors while Redis is away
                        note(f"duplicate not sent: {type(error).__name__}")

    def _poison(self) -> None:
        """Kill the child that draws a poison prompt, each time, as the fake engine does by itself."""
        while not self._over.wait(0.05):
            with contextlib.suppress(ModmError):
                for worker in self.rig.ledger.workers():
                    if worker.busy_with in self.load.tally.poison:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(worker.pid, signal.SIGKILL)


def rig_entries(rig: Rig) -> list[dict[str, object]]:
    found: list[dict[str, object]] = rig.client.get("/v1/cache/entries", limit=50)["entries"]
    return found
