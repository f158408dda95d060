"""Level-triggered reconciler: what is, compared with what should be, mended until they are equal.

One round asks every ready worker for its queues, makes a plan for each that differs, and runs the plans in waves: one
command per (action, queue) addressed to all workers that need it, then ``active_queues`` until each shows the expected
list. Busy workers go first, because a cancel on an idle worker bounces one message (field measurement A5). A round that
fails half-way is harmless: the next one starts from what is.

Breaks where: a worker answers remote control but its consumer is stuck between two lists; it is then reported as
``failed`` round after round and nothing else is held up for longer than ``verify_s`` a wave.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from modm_tasks.cluster import DesiredRole, RoleMove
from modm_tasks.ledger import Ledger
from modm_tasks.messages import WorkerStatus
from modm_tasks.queues import Mode
from orchestrator.controller import roles
from orchestrator.controller.plan import Step, plan, role_queues, target_queues
from orchestrator.controller.preload import Preload
from orchestrator.controller.remote import RemoteControl
from orchestrator.controller.roles import Applied, Decided

log = logging.getLogger(__name__)

VERIFY_EVERY_S = 0.02


@dataclass(kw_only=True)
class Round:
    """What one round found and did. ``took_s``: worker -> seconds from the decision to the verified role."""

    checked: int = 0
    silent: list[str] = field(default_factory=list)
    moves: list[RoleMove] = field(default_factory=list)
    took_s: dict[str, float] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    queues: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Reconciler:
    """Holds nothing but for how long each worker has been unwell, so that any controller may go on where one ended."""

    def __init__(
        self,
        ledger: Ledger,
        remote: RemoteControl,
        *,
        verify_s: float = 2.0,
        still_leading: Callable[[], bool] = lambda: True,
    ) -> None:
        self.ledger, self.remote = ledger, remote
        self.verify_s = verify_s
        self.still_leading = still_leading
        self.preload = Preload(remote)
        self._unwell_since: dict[str, float] = {}
        self._silent: set[str] = set()

    def round(self, workers: Sequence[WorkerStatus], desired: Mapping[str, DesiredRole], mode: Mode) -> Round:
        """Look at ``workers`` (the ready ones) once and mend those that have a desired role.

        Raises UnavailableError where Redis or the broker is away; what was done until then stands.
        """
        here = [w for w in workers if w.worker in desired]
        out = Round(checked=len(here))
        before, decided = roles.applied(self.ledger), roles.decided(self.ledger)
        loading = self.preload.loading(here, desired, before)
        targets = self._targets(here, desired, mode) | dict.fromkeys(loading, ())
        actual = {w: role_queues(q) for w, q in self.remote.active_queues(targets).items()}
        out.silent = sorted(set(targets) - set(actual))
        if set(out.silent) - self._silent:
            log.warning("no answer from %s", ", ".join(out.silent))
        self._silent = set(out.silent)
        plans = {w: plan(queues, targets[w]) for w, queues in actual.items()}
        busy = {w.worker for w in here if w.busy_with}
        for group in (busy, {w.worker for w in here} - busy):
            mine = {w: steps for w, steps in plans.items() if w in group and steps}
            if mine and self.still_leading():
                actual |= self._execute(mine)
        out.queues = actual
        for worker, queues in actual.items():
            if queues == targets[worker]:
                if worker in loading:
                    self.preload.ask(worker, desired[worker])
                if not queues and not desired[worker].drained:
                    continue  # unwell, or loading a model: it has lost its queues, not its role
                self._settled(worker, desired[worker], mode, bool(plans[worker]), before, decided, out)
            else:
                out.failed.append(worker)
                log.warning("still consumes %s", ",".join(queues) or "nothing", extra={"worker": worker})
        return out

    def _targets(
        self, workers: Sequence[WorkerStatus], desired: Mapping[str, DesiredRole], mode: Mode
    ) -> dict[str, tuple[str, ...]]:
        now = time.monotonic()
        unwell = {w.worker for w in workers if w.unwell}
        self._unwell_since = {w: since for w, since in self._unwell_since.items() if w in unwell}
        for worker in unwell - set(self._unwell_since):
            log.warning("is unwell and gets no work", extra={"worker": worker})
            self._unwell_since[worker] = now
        since = self._unwell_since
        return {
            w.worker: target_queues(
                desired[w.worker], mode, unwell_s=now - since[w.worker] if w.worker in since else None
            )
            for w in workers
        }

    def _execute(self, plans: Mapping[str, list[Step]]) -> dict[str, tuple[str, ...]]:
        """Run the plans in waves, each verified before the next. Returns the last seen queues of every worker."""
        left = {w: list(steps) for w, steps in plans.items()}
        seen: dict[str, tuple[str, ...]] = {}
        while left:
            groups: dict[tuple[str, str], set[str]] = defaultdict(set)
            for worker, steps in left.items():
                groups[steps[0].action, steps[0].queue].add(worker)
            for (action, queue), workers in sorted(groups.items()):
                self.remote.send(action, queue, workers)
            now_seen = self._verify({w: steps[0].expect for w, steps in left.items()})
            seen |= now_seen
            left = {w: steps[1:] for w, steps in left.items() if now_seen.get(w) == steps[0].expect and steps[1:]}
            if not self.still_leading():
                break
        return seen

    def _verify(self, expect: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Ask until every worker shows what is expected, or until ``verify_s`` have passed."""
        deadline = time.monotonic() + self.verify_s
        seen: dict[str, tuple[str, ...]] = {}
        waiting: Collection[str] = set(expect)
        while True:
            seen |= {w: role_queues(q) for w, q in self.remote.active_queues(waiting).items()}
            waiting = {w for w in waiting if seen.get(w) != expect[w]}
            if not waiting or time.monotonic() > deadline:
                return seen
            time.sleep(VERIFY_EVERY_S)

    def _settled(
        self,
        worker: str,
        wanted: DesiredRole,
        mode: Mode,
        changed: bool,
        before: Mapping[str, Applied],
        decided: Mapping[str, Decided],
        out: Round,
    ) -> None:
        """A worker is as it should be: note a move, or a repair, once."""
        role = None if wanted.drained else wanted.role
        old = before.get(worker)
        known = old is not None and (old.role, old.mode, old.epoch) == (role, mode, wanted.epoch)
        where = {"worker": worker, "role": role, "epoch": wanted.epoch}
        if known:
            if changed and worker not in self._unwell_since:
                out.repaired.append(worker)
                roles.count(self.ledger, "repairs")
                log.warning("was off its queues and has been brought back", extra=where)
            return
        now_s = self.ledger.now_s()
        roles.set_applied(self.ledger, worker, Applied(role=role, mode=mode, epoch=wanted.epoch, at_s=now_s))
        why = decided.get(worker)
        why = why if why is not None and why.epoch == wanted.epoch else None
        if old is None or old.role == role:
            log.info("role confirmed: %s", ",".join(out.queues[worker]) or "nothing", extra=where)
            return
        move = RoleMove(
            at_s=now_s, worker=worker, old=old.role, new=role, epoch=wanted.epoch, reason=why.reason if why else ""
        )
        self.ledger.record_move(move)
        roles.count(self.ledger, "moves")
        out.moves.append(move)
        if why is not None:
            out.took_s[worker] = max(0.0, now_s - why.at_s)
            roles.note_time(self.ledger, move, took_s=out.took_s[worker])
        took = f" in {out.took_s[worker]:.3f} s" if worker in out.took_s else ""
        log.info("moved from %s%s", old.role or "drained", took, extra=where | {"reason": move.reason})
