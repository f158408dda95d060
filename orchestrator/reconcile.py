"""At the start of an orchestrator: vectors and image files agree again, whatever happened to either meanwhile.

The work of ``modm cache verify --repair``, on a thread of its own, so that serving does not wait for a walk over the
cache. It does not decode images (``--deep`` does): an unreadable source is found when a worker reads it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from modm_tasks.errors import ModmError, UnavailableError
from modm_tasks.ledger import Ledger

if TYPE_CHECKING:
    from vector_store.admin import VerifyReport
    from vector_store.cache import ImageCache

log = logging.getLogger(__name__)

#: With a larger share of files gone than this, the image store is taken to be away (not mounted, wrong address), and
#: nothing is deleted: an operator decides.
MOST_GONE = 0.2
#: So few may be gone whatever their share.
FEW = 10
#: The walk works for so long at a time, and then rests for nine times that: it shares Python's interpreter with routing.
WORK_S, REST = 0.005, 9.0


class Pace:
    """Called often; pauses the caller so that it is at work a tenth of the time. Raises UnavailableError once ``end`` is
    set: a walk that takes minutes must not hold up a stop."""

    def __init__(self, end: threading.Event) -> None:
        self._end = end
        self._since = time.monotonic()

    def __call__(self) -> None:
        worked_s = time.monotonic() - self._since
        if worked_s >= WORK_S:
            if self._end.wait(REST * worked_s):
                raise UnavailableError("the orchestrator is stopping")
            self._since = time.monotonic()


def is_safe(report: VerifyReport) -> bool:
    """Whether what a look without repair found may be mended unasked."""
    gone = len(report.vectors_without_file)
    return not report.wrong_dimension and gone <= max(FEW, MOST_GONE * report.checked)


def reconcile(cache: ImageCache, ledger: Ledger, end: threading.Event) -> VerifyReport | None:
    """Look, and mend where that is safe. Returns what was mended or found; None where a part of it is away, or ``end`` was
    set: both walks may be broken off and begun again."""
    from vector_store.admin import verify

    pace = Pace(end)
    try:
        report = verify(cache, now_s=ledger.now_s(), referenced=ledger.known, rest=pace)
        if report.clean:
            return report
        if not is_safe(report):
            log.error(
                "cache: %d of %d images have no file, %d collections have another dimension; nothing is repaired by "
                "itself: is the image store there? (`modm cache verify` says more)",
                len(report.vectors_without_file), report.checked, len(report.wrong_dimension),
            )  # fmt: skip
            return report
        report = verify(cache, repair=True, now_s=ledger.now_s(), referenced=ledger.known, rest=pace)
    except ModmError as error:
        log.warning("cache not reconciled at start: %s", error)
        return None
    log.warning("cache reconciled at start: %d images, %d repairs", report.checked, report.repaired)
    return report
