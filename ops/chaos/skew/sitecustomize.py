"""Gives one process, and the children that it spawns, a wrong wall clock. Python imports this file by its name, from
PYTHONPATH, before anything else, so production code holds no hook for it.

``MODM_TEST_CLOCK_OFFSET_S`` is added to ``time.time`` and ``time.time_ns``. ``datetime.now`` and programs that are not
Python (Redis) keep the right time, and so does the monotonic clock, as on a host whose date is wrong.
"""

from __future__ import annotations

import os
import time

OFFSET_S = float(os.environ.get("MODM_TEST_CLOCK_OFFSET_S", "0"))

if OFFSET_S:
    _time, _time_ns = time.time, time.time_ns

    def skewed_time() -> float:
        return _time() + OFFSET_S

    def skewed_time_ns() -> int:
        return _time_ns() + int(OFFSET_S * 1e9)

    time.time, time.time_ns = skewed_time, skewed_time_ns
