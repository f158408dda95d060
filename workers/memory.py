"""Memory of this process, without torch."""

from __future__ import annotations

import os
import resource


def rss_mib() -> float:
    """Resident set size now, MiB; where /proc is missing, its peak."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
