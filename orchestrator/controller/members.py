"""Who counts when GPUs are shared out. Pure but for what it remembers: when each worker was last seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from modm_tasks.cluster import DesiredRole
from modm_tasks.messages import WorkerStatus
from modm_tasks.queues import ROLE_QUEUES, Mode, queues_of

#: After so long away, a worker's role is forgotten (an operator's word, pinned or drained, is kept).
FORGET_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Members:
    """``here`` take part in the allocation, by name; ``away`` of them have vanished, but only just."""

    here: tuple[str, ...]
    away: tuple[str, ...] = ()


class Watch:
    """A worker that vanished keeps its place for ``grace_s``, so that a restart does not reshuffle the cluster; but
    only while every queue is served by somebody else, because work that nobody takes is worse than a needless move.
    """

    def __init__(self, *, grace_s: float) -> None:
        self.grace_s = grace_s
        self._seen_s: dict[str, float] = {}

    def members(
        self, ready: Iterable[WorkerStatus], desired: Mapping[str, DesiredRole], mode: Mode, *, now_s: float
    ) -> Members:
        """Ready, well and undrained workers, and those that vanished within the grace time."""
        found = {w.worker: w for w in ready}
        for name in {*found, *desired}:
            if name in found or name not in self._seen_s:
                self._seen_s[name] = now_s
        here = {n for n, w in found.items() if not w.unwell and not (n in desired and desired[n].drained)}
        gone = {
            n
            for n, wanted in desired.items()
            if n not in found and not wanted.drained and now_s - self._seen_s[n] < self.grace_s
        }
        if not covered(here, desired, mode):
            gone = set()
        return Members(here=tuple(sorted(here | gone)), away=tuple(sorted(gone)))

    def forgotten(self, desired: Mapping[str, DesiredRole], *, now_s: float) -> list[str]:
        """Workers that have been away for so long that their role is not worth keeping."""
        kept = {n for n, wanted in desired.items() if wanted.pinned or wanted.drained}
        old = [n for n in desired if n not in kept and now_s - self._seen_s.get(n, now_s) > FORGET_S]
        for name in old:
            del self._seen_s[name]
        return sorted(old)


def covered(here: Iterable[str], desired: Mapping[str, DesiredRole], mode: Mode) -> bool:
    """Whether each queue of the mode is served by some ready worker that has a role."""
    served = {queue for n in here if n in desired for queue in queues_of(mode, desired[n].role)}
    return served >= {queue for (m, _), queues in ROLE_QUEUES.items() if m == mode for queue in queues}
