"""One decision: snapshot -> pure policy -> roles, overload control, and a note of why."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from modm_tasks.cluster import DesiredRole
from modm_tasks.errors import InvalidInputError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import WorkerStatus
from modm_tasks.queues import Role
from modm_tasks.settings import Settings
from orchestrator.controller import history, roles
from orchestrator.controller.members import Members
from orchestrator.controller.metrics import Metrics
from orchestrator.controller.observe import ends_in_s, inputs, plain, read, snapshot_of
from orchestrator.controller.prices import model_step_s, worker_speeds
from orchestrator.controller.rules import Rules
from orchestrator.decisions.allocation.assign import become_large
from orchestrator.decisions.allocation.registry import POLICIES, allocate
from orchestrator.decisions.snapshot import Allocation, ClusterSnapshot, PolicyState, WorkerSpeed

log = logging.getLogger(__name__)

STATE = "controller"
#: Reasons at which the published policies do not take a step: their PID counts periods, not events.
EVENTS = ("workers changed", "assignment changed", "new worker")


def check_allocation(name: str) -> None:
    """Raises InvalidInputError for a policy that does not exist."""
    if name not in POLICIES:
        raise InvalidInputError(f"allocation must be one of {', '.join(POLICIES)}, not {name!r}", field="allocation")


class Decider:
    """Its memory is a document in Redis: ``load`` when a controller becomes the leader, saved with every decision."""

    def __init__(self, settings: Settings, ledger: Ledger, metrics: Metrics) -> None:
        self.settings, self.ledger, self.metrics = settings, ledger, metrics
        self._state = PolicyState()
        self._allocation: str | None = None
        self._n_large: int | None = None
        self._overloaded = False
        self._decided = float("-inf")

    def load(self) -> None:
        """Continue where the last leader ended, its clock included."""
        kept = self.ledger.document(STATE) or {}
        self._state = PolicyState.from_json(kept.get("state"))
        self._allocation, self._n_large = kept.get("allocation"), kept.get("n_large")
        self._overloaded = bool(kept.get("overloaded"))
        since_s = self.ledger.now_s() - kept["decided_s"] if "decided_s" in kept else float("inf")
        self._decided = time.monotonic() - since_s

    def due(self, rules: Rules) -> bool:
        """Whether the period is over."""
        return time.monotonic() - self._decided >= rules.period_s

    def skip(self) -> None:
        """The next decision is a period from now."""
        self._decided = time.monotonic()

    def decide(
        self,
        rules: Rules,
        members: Members,
        ready: Sequence[WorkerStatus],
        desired: Mapping[str, DesiredRole],
        *,
        why: str,
    ) -> Allocation:
        """Decide, write what follows, remember why. Raises UnavailableError, InvalidInputError (unknown policy)."""
        if rules.allocation != self._allocation:
            self._state, self._allocation = PolicyState(degradation=self._state.degradation), rules.allocation
        current: dict[str, Role] = {w: desired[w].role for w in members.here if w in desired}
        n_large = (
            sum(role == "large" for role in current.values()) if current else first_large(rules, len(members.here))
        )
        readings = read(self.ledger, self.settings, rules, ready)
        speeds = worker_speeds(readings, self.settings)
        ends = ends_in_s(readings, self.settings, *model_step_s(readings, self.settings), speeds)
        order = become_large_order(members.here, desired, ends, speeds)
        snapshot = snapshot_of(readings, rules, self.settings, members=order, n_large=n_large)
        keep = why in EVENTS and rules.allocation.startswith("modm-") and self._n_large is not None
        if keep:
            assert self._n_large is not None
            choice = kept_share(self._n_large, len(members.here))
        else:
            choice, self._state = allocate(rules.allocation, snapshot, self._state, variant=rules.variant)
            self._n_large = choice.n_large
            self._decided = time.monotonic()
        changes = self._write_roles(order, desired, current, choice)
        self._overload(rules, choice, snapshot)
        self._save(snapshot)
        self._note(rules, members, snapshot, choice, changes, why)
        return choice

    def _write_roles(
        self,
        order: Sequence[str],
        desired: Mapping[str, DesiredRole],
        current: Mapping[str, Role],
        choice: Allocation,
    ) -> dict[str, str]:
        changes: dict[str, str] = {}
        for place, worker in enumerate(order):
            role: Role = "large" if place < choice.n_large else "small"
            old = current.get(worker)
            if role == old or (worker in desired and desired[worker].pinned):
                continue
            seen = desired[worker].epoch if worker in desired else 0
            if roles.decide(self.ledger, worker, role, reason=choice.reason, seen_epoch=seen) is None:
                log.info("an operator was faster; its role stays", extra={"worker": worker})
                continue
            changes[worker] = f"{old or 'none'} -> {role}"
        return changes

    def _overload(self, rules: Rules, choice: Allocation, snapshot: ClusterSnapshot) -> None:
        """Put degradation and refusal into force, and take back what this controller, and only it, has asked for."""
        control = self.ledger.control()
        active = rules.allocation == "slo" and self.settings.slo.degrade
        degradation = choice.degradation if active else 0
        refuse_until_s = snapshot.now_s + choice.refuse_s if active and choice.refuse_s > 0 else 0.0
        if not active and not self._overloaded:
            return
        changes: dict[str, Any] = {}
        if degradation != control.degradation:
            changes["degradation"] = degradation
            word = "gives up" if degradation > control.degradation else "takes back"
            log.warning("%s quality: step %d -> %d: %s", word, control.degradation, degradation, choice.reason)
        if refuse_until_s or control.refuse_until_s:
            changes["refuse_until_s"] = refuse_until_s
            if refuse_until_s:
                log.warning("new work is refused for %.1f s: %s", choice.refuse_s, choice.reason)
        if changes:
            self.ledger.set_control(**changes)
        self._overloaded = bool(degradation or refuse_until_s)

    def _save(self, snapshot: ClusterSnapshot) -> None:
        self.ledger.document(
            STATE,
            {
                "state": self._state.to_json(),
                "allocation": self._allocation,
                "n_large": self._n_large,
                "overloaded": self._overloaded,
                "decided_s": snapshot.now_s - (time.monotonic() - self._decided),
            },
        )

    def _note(
        self,
        rules: Rules,
        members: Members,
        snapshot: ClusterSnapshot,
        choice: Allocation,
        changes: dict[str, str],
        why: str,
    ) -> None:
        tick: dict[str, Any] = plain(choice.to_json()) | {
            "at_s": snapshot.now_s,
            "why": why,
            "allocation": rules.allocation,
            "mode": rules.mode,
            "n": len(members.here),
            "away": list(members.away),
            "inputs": inputs(snapshot),
            "changes": changes,
        }
        history.remember(self.ledger, tick, keep=self.settings.controller.history)
        roles.count(self.ledger, "decisions")
        self.metrics.decided(rules, snapshot, choice)
        level = logging.INFO if changes or why != "period" else logging.DEBUG
        log.log(level, "%d of %d large (%s): %s", choice.n_large, len(members.here), why, choice.reason)


def become_large_order(
    here: Sequence[str],
    desired: Mapping[str, DesiredRole],
    ends: Mapping[str, float],
    speeds: Mapping[str, WorkerSpeed],
) -> list[str]:
    """`become_large` with the pinned workers where they stay: large ones first, small ones last."""
    roles_now: dict[str, Role] = {w: desired[w].role for w in here if w in desired}
    pinned = [w for w in here if w in desired and desired[w].pinned]
    free = [w for w in here if w not in pinned]
    took = {name: speed.large_s for name, speed in speeds.items()}
    return [
        *(w for w in pinned if roles_now[w] == "large"),
        *become_large(free, roles_now, ends, took),
        *(w for w in pinned if roles_now[w] == "small"),
    ]


def first_large(rules: Rules, n: int) -> int:
    """Large workers before anything is known: as the reference starts (A7): all, or all but one for throughput."""
    if rules.allocation == "static":
        return min(n, rules.static_large)
    return n if rules.allocation == "modm-quality" else max(1, n - 1)


def kept_share(n_large: int, n: int) -> Allocation:
    """The number of the last period, for workers that came or went since."""
    bounded = max(1, min(n, n_large)) if n_large else 0
    return Allocation(n_large=bounded, reason=f"keeps {bounded} of {n} large until the period is over", target=bounded)
