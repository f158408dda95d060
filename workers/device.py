"""What a device is called, and what images cost on it by `modm profile --save` until completions have taught more."""

from __future__ import annotations

import logging
import os
import platform
import tomllib
from pathlib import Path

from modm_tasks.settings import Settings
from workers.catalogue import canonical

log = logging.getLogger(__name__)


def device_name(kind: str) -> str:
    """``NVIDIA A40`` or the processor's name with the number of cores that may be used."""
    if kind in {"cuda", "mps"}:
        import torch

        return str(torch.cuda.get_device_name()) if kind == "cuda" else "Apple GPU"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if os.path.exists("/proc/cpuinfo") else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    word = "fake engine on " if kind == "fake" else ""
    return f"{word}{len(os.sched_getaffinity(0))}-core {model}, no GPU"


def profiled_step_s(settings: Settings, device: str) -> dict[str, float]:
    """Seconds per step by catalogue name, an image's whole time over its steps; nothing where this machine has no profile
    or one of another device."""
    try:
        found = tomllib.loads((settings.home / "profile.toml").read_text(encoding="utf-8"))
        if found["device"] != device:
            return {}
        return {
            canonical(name, settings): float(row["image_s"]) / int(found["total_steps"])
            for name, row in found["models"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        log.warning("profile.toml of this machine is left out: %s", error)
        return {}
