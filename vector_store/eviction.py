"""Which images leave a full cache. Pure choices over a snapshot: no clock, no I/O, no chance.

* ``fifo``: the oldest by insertion. MoDM's sliding window (paper section 5.4); over 90 % of hits retrieve an image of
  the last four hours of the trace (appendix A.1), and old images leaving keeps results diverse.
* ``lru``: the longest unused; an image never used counts from its insertion.
* ``utility``: NIRVANA's LCBFU. Score f*k: 0 at insertion, plus the steps skipped at each use. It keeps what has saved
  most, so it is slow to forget: an image popular once stays for ever, and at equal scores the older one goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Policy = Literal["fifo", "lru", "utility"]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What eviction knows of a cached image."""

    id: str
    seq: int
    created_s: float = 0.0
    last_used_s: float = 0.0
    utility: float = 0.0


def _fifo_key(held: Held) -> tuple[float, int, str]:
    return (0.0, held.seq, held.id)


def _lru_key(held: Held) -> tuple[float, int, str]:
    return (max(held.last_used_s, held.created_s), held.seq, held.id)


def _utility_key(held: Held) -> tuple[float, int, str]:
    return (held.utility, held.seq, held.id)


_KEYS: dict[str, Callable[[Held], tuple[float, int, str]]] = {
    "fifo": _fifo_key,
    "lru": _lru_key,
    "utility": _utility_key,
}


def order(held: Held, policy: Policy) -> tuple[float, int, str]:
    """What an image is sorted by: the least leaves first."""
    return _KEYS[policy](held)


def choose(snapshot: Sequence[Held], capacity: int, policy: Policy = "fifo") -> list[str]:
    """Ids that must leave for ``capacity`` images to stay, the least wanted first. Empty when there is room."""
    excess = len(snapshot) - capacity
    if excess <= 0:
        return []
    return [held.id for held in sorted(snapshot, key=_KEYS[policy])[:excess]]


def fifo(snapshot: Sequence[Held], capacity: int) -> list[str]:
    """See ``choose``."""
    return choose(snapshot, capacity, "fifo")


def lru(snapshot: Sequence[Held], capacity: int) -> list[str]:
    """See ``choose``."""
    return choose(snapshot, capacity, "lru")


def utility(snapshot: Sequence[Held], capacity: int) -> list[str]:
    """See ``choose``."""
    return choose(snapshot, capacity, "utility")
