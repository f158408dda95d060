"""Names of queues, tasks and roles. What a role consumes, in order of preference, is one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from modm_tasks.messages import Route

if TYPE_CHECKING:
    from kombu.entity import Queue

LARGE_GEN = Route.LARGE_GEN.value
SMALL_REFINE = Route.SMALL_REFINE.value
COMPLETIONS = "modm-completions"

TASK_OF_QUEUE = {LARGE_GEN: "modm.large_gen", SMALL_REFINE: "modm.small_refine"}

#: Sent to a worker's own direct queue: bring the model of a role onto the device before the role's work comes.
PREPARE = "modm.prepare_role"

Role = Literal["large", "small"]
Mode = Literal["roles", "pooled"]

#: Published roles: a large worker serves misses first and takes hits when there are none; a small worker serves hits
#: only (paper, section 4.2). Pooled: the roles differ by order alone and no worker is ever idle while work waits.
ROLE_QUEUES: dict[tuple[Mode, Role], tuple[str, ...]] = {
    ("roles", "large"): (LARGE_GEN, SMALL_REFINE),
    ("roles", "small"): (SMALL_REFINE,),
    ("pooled", "large"): (LARGE_GEN, SMALL_REFINE),
    ("pooled", "small"): (SMALL_REFINE, LARGE_GEN),
}


def queues_of(mode: Mode, role: Role) -> tuple[str, ...]:
    return ROLE_QUEUES[mode, role]


def role_of(mode: Mode, queues: tuple[str, ...]) -> Role | None:
    """The role whose ordered queues these are; None where they are no role's (then the reconciler mends them)."""
    for (m, role), wanted in ROLE_QUEUES.items():
        if m == mode and wanted == queues:
            return role
    return None


def queue(name: str) -> Queue:
    """A queue bound to its own direct exchange, so that a publish to it can never be unroutable."""
    from kombu.entity import Exchange, Queue  # costs 0.1 s, which commands that only need names do not pay

    return Queue(name, Exchange(name, type="direct"), routing_key=name)
