"""Do the roles that the system reports agree with what the workers really consume, all through a run?

A thread looks every second: the roles by HTTP's state in Redis, ``active_queues`` by remote control, and Flower's
view of the same workers where its URL is given. A look counts where no move was under way at its beginning or its end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx

from modm_tasks.errors import ModmError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import RequestRecord
from modm_tasks.queues import queues_of
from modm_tasks.settings import Settings
from orchestrator.controller import roles
from orchestrator.controller.plan import role_queues
from orchestrator.controller.remote import RemoteControl

log = logging.getLogger(__name__)
LOOK_S = 1.0


class Witness:
    """A context manager; ``rows`` hold one line for each worker and look."""

    def __init__(self, settings: Settings, *, flower: str = "") -> None:
        self.settings, self.flower = settings, flower.rstrip("/")
        self.ledger = Ledger.from_settings(settings)
        self.remote = RemoteControl.from_settings(settings)
        self.rows: list[dict[str, Any]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        self.remote.close()

    def verdict(self) -> dict[str, Any]:
        """Looks at settled workers, and how many of them disagreed, by witness."""
        settled = [row for row in self.rows if row["settled"]]
        asked = [row for row in settled if row["flower"] is not None]
        return {
            "looks": len(settled),
            "active_queues_disagreed": sum(row["active_queues"] != row["expected"] for row in settled),
            "flower_looks": len(asked),
            "flower_disagreed": sum(row["flower"] != row["expected"] for row in asked),
        }

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.rows += self.look()
            except (ModmError, httpx.HTTPError) as error:
                log.warning("nothing witnessed: %s", error)
            self._end.wait(LOOK_S)

    def look(self) -> list[dict[str, Any]]:
        """One look at all workers that have a role. Raises UnavailableError, httpx.HTTPError."""
        at_s, before = self.ledger.now_s(), self._state()
        actual = self.remote.active_queues(before)
        seen = self._flower()
        after = self._state()
        rows = []
        for worker, state in before.items():
            flower = seen.get(worker)
            rows.append(
                {
                    "at_s": round(at_s, 3),
                    "worker": worker,
                    "role": state["role"],
                    "settled": state == after.get(worker) and state["settled"] and worker in actual,
                    "expected": " ".join(state["queues"]),
                    "active_queues": " ".join(role_queues(actual.get(worker, ()))),
                    "flower": None if flower is None else " ".join(role_queues(flower)),
                }
            )
        return rows

    def _state(self) -> dict[str, dict[str, Any]]:
        """Of every worker with a verified role: the role, its queues, and whether that is what is wanted."""
        mode = self.ledger.control().mode or self.settings.worker.mode
        wanted, applied = self.ledger.desired_roles(), roles.applied(self.ledger)
        return {
            name: {
                "role": now.role,
                "epoch": now.epoch,
                "settled": name in wanted and wanted[name].epoch == now.epoch and now.mode == mode,
                "queues": () if now.role is None else queues_of(mode, now.role),
            }
            for name, now in applied.items()
        }

    def _flower(self) -> dict[str, Sequence[str]]:
        if not self.flower:
            return {}
        answer = httpx.get(f"{self.flower}/api/workers", params={"refresh": "true"}, timeout=10, trust_env=False)
        answer.raise_for_status()
        return {
            name: [str(queue["name"]) for queue in row.get("active_queues", ())] for name, row in answer.json().items()
        }


def first_tasks(moves: Sequence[Mapping[str, Any]], records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Seconds from the decision of each move to the first task of the queue that its new role serves first.

    ``drawing_s``: the part of it in which the worker still drew what it had claimed before the move was verified.
    Moves after which no such task came, or none before the next move of the worker, are left out.
    """
    found = []
    for move in moves:
        took_s, new = move.get("took_s"), move.get("new")
        if took_s is None or new not in {"large", "small"}:
            continue
        decided_s, first = move["at_s"] - took_s, queues_of("roles", new)[0]
        next_s = min(
            (m["at_s"] for m in moves if m["worker"] == move["worker"] and m["at_s"] > move["at_s"]),
            default=float("inf"),
        )
        own = [r for r in records if r.worker == move["worker"] and r.claimed_s is not None and r.done_s is not None]
        claims = [
            r.claimed_s for r in own if r.claimed_s and r.decision and r.decision.route.value == first
            and decided_s <= r.claimed_s < next_s
        ]  # fmt: skip
        if not claims:
            continue
        running = [
            r.done_s for r in own
            if r.claimed_s and r.done_s and r.claimed_s < move["at_s"] and decided_s < r.done_s <= min(claims)
        ]  # fmt: skip
        queued = any(
            r.queued_s is not None and r.queued_s <= decided_s and r.claimed_s is not None and r.claimed_s >= decided_s
            for r in records if r.decision and r.decision.route.value == first
        )  # fmt: skip
        found.append(
            {
                "worker": move["worker"],
                "new": new,
                "decided_s": round(decided_s, 3),
                "verified_s": round(took_s, 4),
                "first_task_s": round(min(claims) - decided_s, 4),
                "drawing_s": round(max(running, default=decided_s) - decided_s, 4),
                "work_waited": queued,
            }
        )
    waited = [f for f in found if f["work_waited"]]
    return {
        "first_tasks": found,
        "slowest_first_task_s": max((f["first_task_s"] for f in waited), default=None),
        "slowest_first_task_after_drawing_s": max((f["first_task_s"] - f["drawing_s"] for f in waited), default=None),
        "slowest_verified_s": max((m["took_s"] for m in moves if m.get("took_s") is not None), default=None),
    }
