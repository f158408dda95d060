"""Routes of workers, runtime control and the controller's reasons. The orchestrator mounts them.

They only read and write state in Redis; the controller, in its own process, acts on it within a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict

from modm_tasks.cluster import Control, DesiredRole
from modm_tasks.errors import InvalidInputError
from modm_tasks.ledger import Ledger
from orchestrator.controller import roles
from orchestrator.controller.history import explain
from orchestrator.decisions.allocation.registry import POLICIES


class RoleBody(BaseModel):
    """``auto`` gives the worker back to the controller."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["large", "small", "auto"]


def worker_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """Every worker that is ready or has a role, by name. ``in_force``: the role last verified; None = drained."""
    desired, applied = ledger.desired_roles(), roles.applied(ledger)
    ready = {status.worker: status for status in ledger.workers()}
    rows = []
    for name in sorted({*desired, *ready}):
        status, wanted, now = ready.get(name), desired.get(name), applied.get(name)
        row: dict[str, Any] = {
            "worker": name,
            "ready": status is not None,
            "role": wanted.role if wanted else None,
            "in_force": now.role if now else None,
            "settled": bool(wanted and now and now.epoch == wanted.epoch),
            "since_s": now.at_s if now else None,
            "epoch": wanted.epoch if wanted else 0,
            "pinned": wanted.pinned if wanted else False,
            "drained": wanted.drained if wanted else False,
        }
        details = status.model_dump(mode="json", exclude={"worker", "role"}) if status else {"unwell": None}
        rows.append(row | details)
    return rows


def build_router(
    get_ledger: Callable[..., Ledger], *, read: Sequence[Any] = (), admin: Sequence[Any] = ()
) -> APIRouter:
    """``read`` and ``admin``: FastAPI dependencies that guard the reading and the changing routes."""
    router = APIRouter(prefix="/v1", tags=["cluster"])

    @router.get("/workers", dependencies=list(read))
    def list_workers(ledger: Ledger = Depends(get_ledger)) -> list[dict[str, Any]]:
        """Every worker: ready or not, wanted and verified role, what it does."""
        return worker_rows(ledger)

    @router.post("/workers/{name}/role", dependencies=list(admin))
    def assign(name: str, body: RoleBody, ledger: Ledger = Depends(get_ledger)) -> DesiredRole:
        """Pin a worker to a role; ``auto`` unpins it."""
        return roles.assign(ledger, name, body.role)

    @router.post("/workers/{name}/drain", dependencies=list(admin))
    def drain(name: str, ledger: Ledger = Depends(get_ledger)) -> DesiredRole:
        """Take no more work; what is running ends."""
        return roles.drain(ledger, name)

    @router.post("/workers/{name}/resume", dependencies=list(admin))
    def resume(name: str, ledger: Ledger = Depends(get_ledger)) -> DesiredRole:
        """Undo a drain."""
        return roles.resume(ledger, name)

    @router.get("/control", dependencies=list(read))
    def get_control(ledger: Ledger = Depends(get_ledger)) -> Control:
        """What was changed at run time; null = as in the settings."""
        return ledger.control()

    @router.put("/control", dependencies=list(admin))
    def put_control(body: Control, ledger: Ledger = Depends(get_ledger)) -> Control:
        """Change the given fields; null returns a field to the settings. In force within a second."""
        changes = body.model_dump(exclude_unset=True)
        check_control(changes)
        return ledger.set_control(**changes)

    @router.get("/controller/explain", dependencies=list(read))
    def explain_controller(
        last: int = Query(10, ge=1, le=10_000), ledger: Ledger = Depends(get_ledger)
    ) -> dict[str, Any]:
        """The last decisions, newest last: inputs, candidates, scores, choice."""
        return explain(ledger, last=last)

    @router.get("/role_moves", dependencies=list(read))
    def role_moves(since_s: float = 0.0, ledger: Ledger = Depends(get_ledger)) -> list[dict[str, Any]]:
        """Moves since then (Unix seconds), oldest first, with the seconds from decision to verification."""
        return roles.timed_moves(ledger, since_s=since_s)

    return router


def check_control(changes: dict[str, Any]) -> None:
    """Raises InvalidInputError for an allocation policy that does not exist."""
    allocation = changes.get("allocation")
    if allocation is not None and allocation not in POLICIES:
        raise InvalidInputError(
            f"allocation must be one of {', '.join(POLICIES)}, not {allocation!r}", field="allocation"
        )
