"""Which faults come in which order. Pure."""

from __future__ import annotations

import random

FAULTS = {
    "kill-child": "SIGKILL of a GPU child",
    "kill-worker": "SIGKILL of a worker",
    "kill-orchestrator": "SIGKILL of the orchestrator",
    "kill-controller": "SIGKILL of the controller",
    "kill-redis": "SIGKILL of Redis, restart from its append-only file (fsync always)",
    "drop-connections": "every connection to Redis dropped",
    "change-roles": "mode and roles changed while work runs",
    "delete-source": "a cached image deleted",
    "truncate-source": "a cached image truncated",
    "garble-source": "a cached image replaced by garbage",
}


def schedule(seed: int, rounds: int) -> list[str]:
    """Every fault ``rounds`` times, each round in an order of its own."""
    rng = random.Random(seed)
    out: list[str] = []
    for _ in range(rounds):
        names = list(FAULTS)
        rng.shuffle(names)
        out += names
    return out
