"""How each fault is injected. One that lasts (a full disk, a cut) is lifted again before ``inject`` returns."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modm_tasks.errors import ModmError
from modm_tasks.messages import FINAL, State
from modm_tasks.output import note
from ops.chaos.load import Load
from ops.chaos.poison import AGAIN, CRASH
from ops.chaos.rig import Rig
from ops.chaos.traffic import PATIENT_S

#: A cut lasts for several leases, so that the work beyond it is given to others meanwhile.
CUT_LEASES = 3
#: How long the disk stays full after the front has noticed, so that workers meet it with finished images in their hands.
FULL_S = 2.0
DAY_S = 86_400.0
#: How long the death of the orchestrator is put off until some request waits on another one's image.
WAITER_S = 20.0
#: How long a cancelled drawing may take to its next step.
CANCEL_S = 20.0
#: In the place of the mark of a poison prompt: the same word to an embedder.
HARMLESS = "[[ crash ]]"
#: Every refined image is drawn again while prompts are out that kill from the second drawing on.
ALL_AGAIN: dict[str, float] = {"verify_floor": 1.5, "escalation_rate": 1.0}


class Faults:
    """``damaged``: id -> when the run broke its image, Unix seconds of the Redis clock. ``cancelled``: ids by the run.

    ``escalation``: the runtime control's ``verify_floor`` and ``escalation_rate`` while nothing else is wanted. ``twin``:
    similarity that is only predicted of an image of the same words.
    """

    def __init__(
        self, rig: Rig, load: Load, rng: random.Random, *, escalation: Mapping[str, float], twin: float | None
    ) -> None:
        self.rig, self.load, self.rng, self.escalation, self.twin = rig, load, rng, dict(escalation), twin
        self.damaged: dict[str, float] = {}
        self.cancelled: set[str] = set()
        self.waiting_at_death = 0
        self._followed: set[str] = set()
        self._poisoned = 0
        self._led_by: str | None = None
        self._joined_s = 0.0

    def without(self) -> set[str]:
        """What this machine does not allow."""
        missing = {"fill-disk": self.rig.disk, "cut-hosts": self.rig.far}
        return {fault for fault, means in missing.items() if means is None}

    def inject(self, fault: str, *, poison: int) -> bool:
        """False where it cannot be injected at present, because another one still lasts. ``poison``: prompts of that."""
        rig = self.rig
        simple: dict[str, Callable[[], None]] = {
            "kill-child": lambda: rig.kill_child(self.rng.randrange(rig.worker_count)),
            "kill-worker": lambda: rig.kill(self._a_worker()),
            "kill-store": rig.kill_store,
            "drop-connections": rig.drop_connections,
            "lose-tokens": rig.lose_tokens,
            "change-roles": self._change_roles,
            "pin-role": self._pin,
            "skew-clock": self._skew,
            "fill-disk": self._fill_disk,
            "cut-hosts": self._cut_hosts,
            "poison": lambda: self._poison(poison),
            "kill-orchestrator": self._kill_orchestrator,
        }
        try:
            if fault in simple:
                simple[fault]()
            elif fault.startswith("kill-"):
                self._led_by = rig.leader()
                rig.kill(fault.removeprefix("kill-"))
            elif fault == "cancel-source":
                return self._cancel_source()
            elif fault == "poison-again":
                return self._poison_again(1 + poison // 6)
            else:
                return self._damage(fault)
        except (ModmError, OSError) as error:
            note(f"{fault}: tried again ({error})")
            return False
        return True

    def over(self, fault: str) -> bool:
        """Whether what only this fault stops goes on again: another controller leads; beyond the cut they say so; what
        kills has failed."""
        if fault == "kill-controller":
            return self.rig.leader() not in (None, self._led_by)
        if fault == "cut-hosts":
            return self.rig.said_since(self._joined_s)
        return self._poison_over() if fault in ("poison", "poison-again") else True

    def _a_worker(self) -> str:
        return f"worker{self.rng.randrange(self.rig.worker_count)}"

    def _change_roles(self) -> None:
        large = self.rng.randrange(1, self.rig.worker_count + 1)
        mode = self.rng.choice(["roles", "pooled"])
        self.rig.client.put("/v1/control", json={"mode": mode, "allocation": "static", "static_large": large})

    def _pin(self) -> None:
        """One worker only: with all pinned small nobody would draw misses, which is what the operator asked for."""
        names = sorted(row["worker"] for row in self.rig.client.get("/v1/workers"))
        chosen = self.rng.choice(names)
        for name in names:
            role = self.rng.choice(["large", "small"]) if name == chosen else "auto"
            self.rig.client.post(f"/v1/workers/{name}/role", json={"role": role})

    def unpin(self) -> None:
        for row in self.rig.client.get("/v1/workers"):
            self.rig.client.post(f"/v1/workers/{row['worker']}/role", json={"role": "auto"})

    def _skew(self) -> None:
        name = self.rng.choice(["orchestrator", "controller", self._a_worker()])
        self.rig.skew(name, self.rng.choice([-1, 1]) * self.rng.uniform(60.0, DAY_S))

    def _fill_disk(self) -> None:
        """Full until the front refuses work because of it, and some time longer."""
        assert self.rig.disk is not None
        try:
            self.rig.disk.fill()
            self.rig.wait(lambda: not self.rig.ready(), 30.0, "the front to see a full disk")
            self.rig.pause(FULL_S)
        finally:
            self.rig.disk.empty()

    def _cut_hosts(self) -> None:
        assert self.rig.far is not None
        try:
            self.rig.far.cut()
            self.rig.pause(CUT_LEASES * self.rig.settings.worker.lease_s)
        finally:
            self.rig.far.join()
            self._joined_s = self.rig.ledger.now_s()

    def _poison(self, count: int) -> None:
        """Recovered when each has failed: they count as ended requests, and the load waits for their workers."""
        for number in range(count):
            # Unlike one another, or each would wait for the one before.
            prompt = self.load.prompts[-1 - 41 * self._poisoned % len(self.load.prompts)]
            self._poisoned += 1
            self.load.send({"prompt": f"{CRASH} {prompt}"}, self.load.tally.poison)
            if number == 0:
                self._follow(f"{CRASH} {prompt}")

    def _poison_again(self, count: int) -> bool:
        """Recovered when each is answered with its first image: drawn before, so hits, below the floor of the moment. False
        while too little has been drawn."""
        entries: list[dict[str, Any]] = self.rig.client.get("/v1/cache/entries", limit=50)["entries"]
        whole = {str(e["prompt"]) for e in entries if e["depth"] == 0 and e["id"] not in self.damaged}
        drawn = sorted(whole.intersection(self.load.prompts))
        if len(drawn) < count:
            return False
        self.escalate(ALL_AGAIN)
        for prompt in self.rng.sample(drawn, count):
            wanted = {"prompt": f"{AGAIN} {prompt}", "deadline_s": PATIENT_S}
            self.load.send(wanted, self.load.tally.poison_again)
        return True

    def _follow(self, prompt: str) -> None:
        """One that waits on the poison, as no cached image is so like it: it gives up, or is there when that fails."""
        choosy = {} if self.twin is None else {"min_similarity": self.twin}
        self.load.send({"prompt": prompt.replace(CRASH, HARMLESS)} | choosy)

    def _poison_over(self) -> bool:
        tally = self.load.tally
        rows = self.rig.ledger.get_many([*tally.poison, *tally.poison_again])
        last = self.rig.settings.worker.max_attempts
        for row in rows:
            if (
                row.id in tally.poison
                and row.state is State.RUNNING
                and row.attempt == last
                and row.id not in self._followed
            ):
                self._followed.add(row.id)
                self._follow(row.request.prompt)
        if not all(row.state in FINAL for row in rows):
            return False
        self.escalate(self.escalation)
        return True

    def escalate(self, how: Mapping[str, float]) -> None:
        """Set floor and budget of verification. Raises ModmError."""
        self.rig.client.put("/v1/control", json=dict(how))

    def _kill_orchestrator(self) -> None:
        """While somebody waits on another one's image, if that comes to pass soon."""
        self.rig.soon(lambda: self.rig.ledger.index("waiting"), WAITER_S)
        self.waiting_at_death += len(self.rig.ledger.index("waiting"))
        self.rig.kill("orchestrator")

    def _cancel_source(self) -> bool:
        """What a request waits on, unless it is poison, whose end is counted. False where it was done before that took hold:
        another one is cancelled then."""
        spared = self.load.tally.poison | self.load.tally.poison_again
        sources = {self.rig.ledger.field(waiter, "waits_on") for waiter in self.rig.ledger.index("waiting")}
        found = self.rig.ledger.get_many(s for s in sources if s is not None and s not in spared)
        chosen = min(found, key=lambda r: r.state is State.RUNNING, default=None)
        if chosen is None:
            return False
        self.cancelled.add(chosen.id)
        self.rig.client.post(f"/v1/requests/{chosen.id}/cancel")
        ended = self.rig.soon(lambda: self.rig.ledger.get(chosen.id).state in FINAL, CANCEL_S)
        return ended is not None and self.rig.ledger.get(chosen.id).state is State.CANCELLED

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
