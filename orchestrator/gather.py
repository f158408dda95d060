"""Batches that form by themselves: what has gathered in a queue while its one reader was busy."""

from __future__ import annotations

import queue
from typing import Any


def gather(inbox: queue.SimpleQueue[Any] | queue.Queue[Any], limit: int) -> list[Any] | None:
    """Wait for one item and take with it what lies there, at most ``limit``. None: the end was put in."""
    first = inbox.get()
    if first is None:
        return None
    batch = [first]
    while len(batch) < limit:
        try:
            more = inbox.get_nowait()
        except queue.Empty:
            break
        if more is None:
            inbox.put(None)
            break
        batch.append(more)
    return batch
