"""Flower: a window for operators, never a lever. The control loop does not depend on it.

Started by `modm flower`, which adds address, port and the broker. Basic auth comes from FLOWER_BASIC_AUTH=user:password.
"""

from __future__ import annotations

from typing import Any

address = "127.0.0.1"
port = 5555

# A human's add-consumer would fight the reconciler; roles are changed through the orchestrator.
read_only = True

# The default of 100,000 tasks held in memory is what its users report as a leak.
max_tasks = 5000
persistent = False
purge_offline_workers = 300

tasks_columns = "name,uuid,state,args,received,started,runtime,worker"
# From one small image on a GPU to one large image on a CPU.
task_runtime_metric_buckets = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 120.0, 300.0]

MAX_TEXT_CHARS = 60


def format_task(task: Any) -> Any:
    """Cut long texts. Our tasks carry ids and numbers only; a task of another app on the same Redis may not."""
    for name in ("args", "kwargs", "result", "exception"):
        value = getattr(task, name, None)
        if value is not None and len(str(value)) > MAX_TEXT_CHARS:
            setattr(task, name, f"{str(value)[:MAX_TEXT_CHARS]}...")
    return task
