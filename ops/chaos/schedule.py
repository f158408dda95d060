"""Which faults come when. Pure: the same seed gives the same plan.

The plan is paced by finished requests, not by the clock, so that a slow machine meets each fault at the same point of the
load as a fast one.
"""

from __future__ import annotations

import random
from collections.abc import Collection

FAULTS = {
    "kill-child": "SIGKILL of a GPU child",
    "kill-worker": "SIGKILL of a worker",
    "kill-orchestrator": "SIGKILL of the orchestrator",
    "kill-store": "SIGKILL of the embedded vector store's process",
    "kill-controller": "SIGKILL of the controller",
    "kill-redis": "SIGKILL of Redis, restart from its append-only file (fsync always)",
    "drop-connections": "every connection to Redis dropped",
    "change-roles": "mode and roles changed while work runs",
    "pin-role": "a worker pinned to a role, the others given back to the controller",
    "lose-tokens": "every queue message thrown away",
    "delete-source": "a cached image deleted",
    "truncate-source": "a cached image truncated",
    "garble-source": "a cached image replaced by garbage",
    "skew-clock": "a process started again with its clock up to a day wrong",
    "fill-disk": "the image disk full to the last byte, then emptied",
    "cut-hosts": "two hosts cut from each other, then joined",
    "cancel-source": "a request cancelled that another one waits on",
    "poison": "prompts that kill the process that draws them, at each attempt",
    "poison-again": "prompts whose refined image scores too low, and that kill the process that draws them again",
}


def schedule(seed: int, rounds: int, *, without: Collection[str] = ()) -> list[str]:
    """Every fault ``rounds`` times, each round in an order of its own. ``without``: what this machine does not allow."""
    rng = random.Random(seed)
    out: list[str] = []
    for _ in range(rounds):
        names = [name for name in FAULTS if name not in without]
        rng.shuffle(names)
        out += names
    return out


def plan(seed: int, *, rounds: int, requests: int, without: Collection[str] = ()) -> list[tuple[int, str]]:
    """(finished requests, fault): spread evenly over the load, the first after a step of it."""
    faults = schedule(seed, rounds, without=without)
    step = max(1, requests // (len(faults) + 1))
    return [((number + 1) * step, fault) for number, fault in enumerate(faults)]


def share(count: int, parts: int, index: int) -> int:
    """How many of ``count`` things the ``index``-th of ``parts`` gets, the first ones more."""
    return count // parts + (index < count % parts)
