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
from typing import Any

from modm_tasks.app import make_app
from modm_tasks.errors import ModmError
from modm_tasks.output import note
from modm_tasks.queues import TASK_OF_QUEUE
from ops.chaos.load import Load
from ops.chaos.rig import Rig
from ops.chaos.schedule import plan
from ops.chaos.verify import Seen, Verdict, gather, idle_workers, judge

#: Longest wait for the stack to be whole and for a request to end after a fault. A fault without is "not recovered".
RECOVERY_S = 120.0


@dataclass(kw_only=True)
class Outcome:
    """``recovery_s``: of each fault, the seconds until the stack was whole and a request had ended again."""

    verdict: Verdict
    recovery_s: Mapping[str, Sequence[float]]
    duplicates: int
    restarts: int
    outages: int
    errors: Sequence[str]
    took_s: float


@dataclass
class Chaos:
    """``requests`` is the least; the load goes on until every fault has been injected or ``limit_s`` is over.

    ``damaged``: id -> when the run broke its image, Unix seconds of the Redis clock.
    """

    rig: Rig
    prompts: Sequence[str]
    requests: int
    rounds: int
    seed: int
    poison: int = 10
    users: int = 8
    limit_s: float = float("inf")
    kill_poisoned: bool = False
    damaged: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.faults = plan(self.seed, rounds=self.rounds, requests=self.requests)
        self.began = time.monotonic()
        self.injected = self.duplicates = self.unrecovered = 0
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        poison = [f"[[crash]] poison {n}" for n in range(self.poison)]
        every = max(2, min(40, self.requests // max(1, self.poison)))
        self.load = Load(
            self.rig.url,
            self.prompts,
            poison,
            users=self.users,
            enough=self._enough,
            seed=self.seed,
            poison_every=every,
        )
        self._over = threading.Event()

    def _late(self) -> bool:
        return time.monotonic() - self.began > self.limit_s

    def _enough(self, sent: int) -> bool:
        return self._late() or (sent >= self.requests and self.injected == len(self.faults))

    def run(self) -> Outcome:
        load = threading.Thread(target=self.load.run, name="load")
        helpers = [threading.Thread(target=self._duplicate)]
        if self.kill_poisoned:
            helpers.append(threading.Thread(target=self._kill_poisoned))
        for thread in (load, *helpers):
            thread.start()
        try:
            self._inject_all()
            self.rig.soon(lambda: not load.is_alive(), 600.0)
            with contextlib.suppress(ModmError):
                self._unpin()
            ended = self.rig.soon(self.rig.whole, RECOVERY_S) is not None
            ended = self.rig.soon(self._settled, RECOVERY_S) is not None and ended
        finally:
            self.load.stop()
            self._over.set()
            for thread in (load, *helpers):
                thread.join()
        if not ended:
            note("the stack is not whole, or requests are open: counted below")
        return self._outcome()

    def _outcome(self) -> Outcome:
        tally = self.load.tally
        idle: list[str] = []
        self.rig.soon(lambda: not idle_workers(self.rig.settings, self.rig.live_workers(), into=idle), 30.0)
        seen: Seen = gather(self.rig.ledger, self.rig.client, tally.accepted)
        verdict = judge(
            seen,
            prompts={i: tally.prompts[i] for i in tally.accepted},
            poison=tally.poison,
            damaged=self.damaged,
            max_attempts=self.rig.settings.worker.max_attempts,
        )
        return Outcome(
            verdict=verdict.model_copy(
                update={
                    "idle_workers": self.rig.worker_count - len(self.rig.live_workers()) + len(idle),
                    "unrecovered": self.unrecovered,
                }
            ),
            recovery_s=dict(self.recovery_s),
            duplicates=self.duplicates,
            restarts=self.rig.restarts,
            outages=tally.outages,
            errors=tally.errors,
            took_s=time.monotonic() - self.began,
        )

    def _settled(self) -> bool:
        try:
            counts = self.rig.ledger.counts()
        except ModmError:
            return False
        return counts["open"] == 0 and counts["unadmitted"] == 0

    def _inject_all(self) -> None:
        tally = self.load.tally
        for due, fault in self.faults:
            self.rig.soon(functools.partial(self._ended, due), 300.0)
            if self._late():
                note(f"time is up after {self.injected} of {len(self.faults)} faults")
                return
            began = time.monotonic()
            self._inject(fault)
            took_s = self.rig.soon(functools.partial(self._recovered, tally.ended), RECOVERY_S)
            if took_s is None:
                self.unrecovered += 1
                note(f"not whole {RECOVERY_S:g} s after {fault}")
            else:
                self.recovery_s[fault].append(time.monotonic() - began)
                note(f"{self.injected + 1}/{len(self.faults)} {fault}: {took_s:.1f} s; {tally.ended} ended")
            self.injected += 1

    def _ended(self, due: int) -> bool:
        return self.load.tally.ended >= due or self._late()

    def _recovered(self, before: int) -> bool:
        return self.load.tally.ended > before and self.rig.whole()

    def _inject(self, fault: str) -> None:
        """Raises nothing: a fault that cannot be injected because another one still lasts is tried until it can."""
        self.rig.soon(lambda: self._try(fault), 60.0)

    def _try(self, fault: str) -> bool:
        rig = self.rig
        try:
            if fault == "kill-child":
                rig.kill_child(self.rng.randrange(rig.worker_count))
            elif fault == "kill-worker":
                rig.kill(f"worker{self.rng.randrange(rig.worker_count)}")
            elif fault.startswith("kill-"):
                rig.kill(fault.removeprefix("kill-"))
            elif fault == "drop-connections":
                rig.drop_connections()
            elif fault == "lose-tokens":
                rig.lose_tokens()
            elif fault == "change-roles":
                large = self.rng.randrange(1, rig.worker_count + 1)
                mode = self.rng.choice(["roles", "pooled"])
                rig.client.put("/v1/control", json={"mode": mode, "allocation": "static", "static_large": large})
            elif fault == "pin-role":
                self._pin()
            else:
                return self._damage(fault)
        except (ModmError, OSError) as error:
            note(f"{fault}: tried again ({error})")
            return False
        return True

    def _pin(self) -> None:
        """One worker only: with all pinned small nobody would draw misses, which is what the operator asked for."""
        names = sorted(row["worker"] for row in self.rig.client.get("/v1/workers"))
        chosen = self.rng.choice(names)
        for name in names:
            role = self.rng.choice(["large", "small"]) if name == chosen else "auto"
            self.rig.client.post(f"/v1/workers/{name}/role", json={"role": role})

    def _unpin(self) -> None:
        for row in self.rig.client.get("/v1/workers"):
            self.rig.client.post(f"/v1/workers/{row['worker']}/role", json={"role": "auto"})

    def _damage(self, fault: str) -> bool:
        """Break one of the newest cached images, which the next prompts are likely to find."""
        found: list[dict[str, Any]] = self.rig.client.get("/v1/cache/entries", limit=50)["entries"]
        fresh = [e for e in found if e["id"] not in self.damaged]
        if not fresh:
            return False
        chosen = self.rng.choice(fresh[:5])
        path = Path(self.rig.settings.image_root, str(chosen["uri"]))
        if fault == "delete-source":
            path.unlink()
        elif fault == "truncate-source":
            path.write_bytes(path.read_bytes()[:100])
        else:
            path.write_bytes(self.rng.randbytes(4096))
        self.damaged[str(chosen["id"])] = self.rig.ledger.now_s()
        return True

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

    def _kill_poisoned(self) -> None:
        """Kill the child that draws a poison prompt, each time, as the fake engine does by itself."""
        while not self._over.wait(0.05):
            with contextlib.suppress(ModmError):
                alive = self.rig.live_workers()
                for worker in self.rig.ledger.workers():
                    if worker.busy_with in self.load.tally.poison and worker.worker in alive:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(worker.pid, signal.SIGKILL)
