"""A move to a role whose model is not on the device: the load comes before the traffic.

The worker's old role queues are cancelled first, because its direct queue is polled last; then `prepare_role` goes to that
queue; when the worker says that the model is resident, the reconciler gives it the queues of the new role. Meanwhile it
serves nothing, for the load's measured price (``switch_s`` in the snapshot). Where that takes too long the move goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping

from modm_tasks.cluster import DesiredRole
from modm_tasks.messages import WorkerStatus
from orchestrator.controller.remote import RemoteControl
from orchestrator.controller.roles import Applied

log = logging.getLogger(__name__)

#: Longest wait for a load, at least, and as a multiple of its measured price.
PATIENCE_S, PATIENCE = 120.0, 4.0


class Preload:
    """Remembers which loads were asked for; a controller that takes over asks once more, which costs nothing."""

    def __init__(self, remote: RemoteControl) -> None:
        self.remote = remote
        self._asked: dict[str, int] = {}
        self._began: dict[str, tuple[int, float]] = {}

    def loading(
        self, workers: Collection[WorkerStatus], desired: Mapping[str, DesiredRole], before: Mapping[str, Applied]
    ) -> list[str]:
        """Names of those that must load before they move: the role is new, its model is elsewhere, patience is left."""
        now, found = time.monotonic(), []
        for w in workers:
            wanted, old = desired[w.worker], before.get(w.worker)
            model = w.large_model if wanted.role == "large" else w.small_model
            moves = old is not None and old.role not in {None, wanted.role} and not wanted.drained and not w.unwell
            if not moves or not w.models or model in w.models:
                continue
            epoch, since = self._began.get(w.worker, (wanted.epoch, now))
            if epoch != wanted.epoch:
                since = now
            self._began[w.worker] = (wanted.epoch, since)
            if now - since > max(PATIENCE_S, PATIENCE * w.swap_s.get(model, 0.0)):
                log.warning(
                    "%s is not loaded after %.0f s; moved without", model, now - since, extra={"worker": w.worker}
                )
                continue
            found.append(w.worker)
        return found

    def ask(self, worker: str, wanted: DesiredRole) -> None:
        """Send `prepare_role`, once for each decision. Raises UnavailableError."""
        if self._asked.get(worker) != wanted.epoch:
            self.remote.prepare(worker, wanted.role)
            self._asked[worker] = wanted.epoch
            log.info("loads its model before it becomes %s", wanted.role, extra={"worker": worker})
