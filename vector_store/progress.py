"""What an import has done, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from vector_store.folder import Problem


@dataclass(kw_only=True)
class ImportReport:
    """What an import did. ``skipped`` were in the cache already."""

    imported: int = 0
    skipped: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return self.imported + self.skipped + len(self.problems)

    def add(self, other: ImportReport) -> None:
        self.imported += other.imported
        self.skipped += other.skipped
        self.problems += other.problems

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an import is. ``left_s`` is None before the first batch."""

    done: int
    total: int
    per_s: float
    left_s: float | None


class Pace:
    """Progress from counts and a clock. What was skipped costs next to nothing and does not count for the rate."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock, self._began = total, clock, clock()

    def at(self, report: ImportReport) -> Progress:
        """Where we are."""
        done = min(self._total, report.seen)
        per_s = report.imported / max(1e-9, self._clock() - self._began)
        left_s = (self._total - done) / per_s if per_s > 0 else None
        return Progress(done=done, total=self._total, per_s=per_s, left_s=left_s)
