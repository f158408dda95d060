"""The controller's process: one leads, decides now and then, reconciles all the time.

Everything it knows stands in Redis, so a second controller continues where a first one ended: decision state, the time
of the last decision, desired roles. Two leaders at once (a stalled one that wakes up) do no harm: roles are written by
compare-and-set, and reconciling is idempotent.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping

from modm_tasks.cluster import Control, DesiredRole
from modm_tasks.errors import UnavailableError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import WorkerStatus
from modm_tasks.queues import TASK_OF_QUEUE
from modm_tasks.settings import Settings
from orchestrator.controller import roles
from orchestrator.controller.decide import Decider
from orchestrator.controller.members import Members, Watch
from orchestrator.controller.metrics import Metrics
from orchestrator.controller.pooling import adjust
from orchestrator.controller.reconcile import Reconciler
from orchestrator.controller.remote import RemoteControl
from orchestrator.controller.rules import Rules

log = logging.getLogger(__name__)

LOCK = "controller"
#: How often control and membership are looked at: a change is acted on within a second.
LOOK_S = 0.25
#: Longest pause between attempts while Redis is away.
BACKOFF_S = 2.0


class Controller:
    """Several may run; one leads. Not thread-safe: ``run`` is the only thread, ``stop`` may be called from any."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        remote: RemoteControl,
        *,
        name: str | None = None,
        metrics: Metrics | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.ledger, self.remote = settings, ledger, remote
        self.name = name or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self.metrics = metrics or Metrics()
        self._on_end = on_end
        self.leading = False
        self.decider = Decider(settings, ledger, self.metrics)
        self.reconciler = Reconciler(ledger, remote, still_leading=self._lead)
        self._watch = Watch(grace_s=settings.controller.away_grace_s)
        self._end = threading.Event()
        self._rules: Rules | None = None
        self._members: Members | None = None
        self._reconciled = float("-inf")
        self._last_desired: dict[str, DesiredRole] = {}

    @classmethod
    def from_settings(cls, settings: Settings) -> Controller:
        """Ready to run, metrics endpoint included. Raises UnavailableError: no Redis is known, or the port is in use."""
        ledger, remote, metrics = Ledger.from_settings(settings), RemoteControl.from_settings(settings), Metrics()
        return cls(settings, ledger, remote, metrics=metrics, on_end=metrics.serve(settings))

    def stop(self) -> None:
        """Ask ``run`` to end; it does within about a second."""
        self._end.set()

    def run(self) -> None:
        """Until ``stop``. Survives every outage of Redis; hands the lead over when it ends."""
        down, pause_s = False, LOOK_S
        log.info("controller %s runs", self.name)
        while not self._end.wait(pause_s):
            try:
                self.look()
                if down:
                    log.info("Redis is back")
                down, pause_s = False, LOOK_S
            except UnavailableError as error:
                if not down:
                    log.error("waiting: %s", error)
                    self.metrics.outages.inc()
                down, pause_s = True, min(BACKOFF_S, pause_s * 2)
                self._rules = None  # read everything again when it is back
            except Exception:
                # One bad tick (a policy's bug, say) must not leave the cluster without its reconciler.
                log.exception("the controller met a bug and goes on")
                pause_s = BACKOFF_S
        self._leave()

    def look(self) -> None:
        """One look: lead or stand by; decide if it is time; reconcile if it is time or roles have changed."""
        if not self._lead():
            return
        ready = self.ledger.workers()
        control = adjust(self.ledger, self.settings, self.ledger.control(), ready)
        rules = Rules.of(self.settings, control)
        desired = self.ledger.desired_roles()
        members = self._watch.members(ready, desired, rules.mode, now_s=time.monotonic())
        why = self._why(rules, members, desired)
        self._rules, self._members = rules, members
        if why is not None and members.here:
            self._decide(rules, members, ready, desired, why)
            desired = self.ledger.desired_roles()
        self._reconcile(ready, desired, rules, control)

    def _decide(
        self,
        rules: Rules,
        members: Members,
        ready: list[WorkerStatus],
        desired: dict[str, DesiredRole],
        why: str,
    ) -> None:
        """A policy that fails costs its decision, never the reconciling."""
        try:
            self.decider.decide(rules, members, ready, desired, why=why)
        except UnavailableError:
            raise
        except Exception:
            log.exception("no decision: roles stay until the next period")
            self.decider.skip()

    def _why(self, rules: Rules, members: Members, desired: Mapping[str, DesiredRole]) -> str | None:
        """The reason to decide now; None = not yet."""
        if self._rules is None:
            return "period" if self.decider.due(rules) else "new worker" if set(members.here) - set(desired) else None
        if rules != self._rules:
            return "control changed"
        if self._members is not None and set(members.here) != set(self._members.here):
            return "workers changed"
        if any((now := desired.get(n)) is None or now.pinned != w.pinned for n, w in self._last_desired.items()):
            return "assignment changed"
        return "period" if self.decider.due(rules) else None

    def _reconcile(
        self, ready: list[WorkerStatus], desired: dict[str, DesiredRole], rules: Rules, control: Control
    ) -> None:
        now = time.monotonic()
        if desired == self._last_desired and now - self._reconciled < self.settings.controller.reconcile_s:
            return
        self._last_desired = desired
        self._reconciled = now
        self.metrics.saw(self.reconciler.round(ready, desired, rules.mode))
        self.metrics.workers(desired, {w.worker for w in ready}, {w.worker for w in ready if w.unwell})
        self.metrics.degradation.set(control.degradation)
        counts = self.ledger.counts()
        for queue in TASK_OF_QUEUE:
            self.metrics.backlog.labels(queue).set(counts[f"ready:{queue}"])
        for worker in self._watch.forgotten(desired, now_s=now):
            log.info("away for long and forgotten", extra={"worker": worker})
            roles.forget(self.ledger, worker)

    def _lead(self) -> bool:
        leading = self.ledger.lead(LOCK, self.name, self.settings.controller.leader_ttl_s)
        if leading != self.leading:
            log.info("controller %s %s", self.name, "leads" if leading else "stands by")
            self._rules = None
            if leading:
                self._take_over()
        self.leading = leading
        self.metrics.leading.set(int(leading))
        return leading

    def _take_over(self) -> None:
        self.decider.load()
        # The ledger's scripts count into buckets of the control's length, not of anybody's settings.
        if self.ledger.control().bucket_s is None:
            self.ledger.set_control(bucket_s=self.settings.controller.bucket_s)

    def _leave(self) -> None:
        try:
            self.ledger.stop_leading(LOCK, self.name)
        except UnavailableError as error:
            log.warning("the lock ends by itself: %s", error)
        self.remote.close()
        self._on_end()
        log.info("controller %s has ended", self.name)
