"""Which device a worker has, from its node name, and the environment that pins it. Pure; no torch.

The variables must be in the environment before the child process starts: after CUDA is initialised they do nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from modm_tasks.settings import Settings

#: NVIDIA, then ROCm's two: HIP for the runtime, ROCR for the driver.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_NODE = re.compile(r"^gpu([0-9A-Za-z_-]+?)(?:@|$)")


def gpu_of(node: str) -> str:
    """``gpu3@host`` -> ``"3"``; empty when the name says nothing of a GPU."""
    match = _NODE.match(node)
    return match[1] if match else ""


def pinned(gpu: str, environ: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """What to add to the environment. What the user has set already stays.

    Under ROCm, HIP indices count within what ROCR leaves visible, so setting both to 3 would hide every device: ROCR is
    set only where it alone is used (``HIP_VISIBLE_DEVICES`` is honoured by every ROCm build of torch).
    """
    out: dict[str, str] = {}
    if gpu and not any(name in environ for name in VISIBLE):
        out |= {"CUDA_VISIBLE_DEVICES": gpu, "HIP_VISIBLE_DEVICES": gpu}
    if threads > 0:
        out |= {name: str(threads) for name in THREADS if name not in environ}
    return out


def thread_count(settings: Settings, *, share: int = 1) -> int:
    """CPU threads of one worker: the setting, else cores divided by the workers that share the machine.

    A lone worker takes half of the cores: the orchestrator's embedder runs there too, and threads that spin for a core
    that is taken are worse than none (tiny pipelines on two busy cores: 35 times slower with two threads than with one).
    """
    return settings.worker.threads or max(1, len(os.sched_getaffinity(0)) // max(2, share))


def served_models(settings: Settings) -> tuple[str, ...]:
    """Large, fallback and small model, once each; the small one last, so that it is the most recently used."""
    names = (settings.large_model, settings.slo.fallback_small_model, settings.small_model)
    return tuple(dict.fromkeys(name for name in names if name))
