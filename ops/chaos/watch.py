"""Memory and file descriptors of every process while the run lasts: do they grow without end?

Each process is judged by itself, from the time when it has warmed up: killed ones start anew, so the longest-lived of
each kind tells most.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

PERIOD_S = 1.0
#: Imports, model loading and first connections are no leak.
WARM_UP_S = 15.0
#: A process seen for less says nothing.
LEAST_S = 30.0
#: What may be added to the first quarter's median by the last quarter's: caches, the ledger's growing indexes.
MAX_MIB, MAX_SHARE, MAX_DESCRIPTORS = 48.0, 0.2, 12


@dataclass(frozen=True)
class Sample:
    """``at_s`` is monotonic."""

    at_s: float
    rss_mib: float
    descriptors: int


class Growth(BaseModel):
    """One process: medians of the first and of the last quarter of its warm life."""

    model_config = ConfigDict(frozen=True)

    name: str
    watched_s: float
    first_mib: float
    last_mib: float
    first_descriptors: int
    last_descriptors: int

    @property
    def flat(self) -> bool:
        more_mib = self.last_mib - self.first_mib
        return (
            more_mib <= max(MAX_MIB, MAX_SHARE * self.first_mib)
            and self.last_descriptors - self.first_descriptors <= MAX_DESCRIPTORS
        )


def sample(pid: int, at_s: float) -> Sample | None:
    """Of a process of /proc; None where it has gone."""
    folder = Path("/proc", str(pid))
    try:
        pages = int((folder / "statm").read_text().split()[1])
        return Sample(at_s, pages * 4096 / 2**20, sum(1 for _ in (folder / "fd").iterdir()))
    except (OSError, IndexError, ValueError):
        return None


def growth(name: str, samples: Sequence[Sample]) -> Growth | None:
    """Pure; None where it was not watched for long enough."""
    warm = [s for s in samples if s.at_s - samples[0].at_s >= WARM_UP_S]
    if len(warm) < 8 or warm[-1].at_s - warm[0].at_s < LEAST_S:
        return None
    quarter = len(warm) // 4
    first, last = warm[:quarter], warm[-quarter:]
    return Growth(
        name=name,
        watched_s=warm[-1].at_s - warm[0].at_s,
        first_mib=statistics.median(s.rss_mib for s in first),
        last_mib=statistics.median(s.rss_mib for s in last),
        first_descriptors=int(statistics.median(s.descriptors for s in first)),
        last_descriptors=int(statistics.median(s.descriptors for s in last)),
    )


class Watch:
    """``pids()`` names the processes of the moment; called from a thread of its own."""

    def __init__(self, pids: Callable[[], Mapping[str, int]], clock: Callable[[], float]) -> None:
        self._pids, self._clock = pids, clock
        self._samples: dict[tuple[str, int], list[Sample]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> list[Growth]:
        """Every process that was seen for long enough."""
        self._end.set()
        self._thread.join()
        found = (growth(name, samples) for (name, _), samples in sorted(self._samples.items()))
        return [g for g in found if g is not None]

    def _run(self) -> None:
        while not self._end.wait(PERIOD_S):
            for name, pid in self._pids().items():
                if (seen := sample(pid, self._clock())) is not None:
                    self._samples.setdefault((name, pid), []).append(seen)


def longest(found: Sequence[Growth]) -> list[Growth]:
    """The longest-lived process of each name."""
    best: dict[str, Growth] = {}
    for one in found:
        if one.name not in best or one.watched_s > best[one.name].watched_s:
            best[one.name] = one
    return [best[name] for name in sorted(best)]
