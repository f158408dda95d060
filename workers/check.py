"""`modm models check`: load one model, draw and refine a little, report what it costs here."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

from modm_tasks.settings import Settings
from workers.catalogue import ModelEntry
from workers.diffusers_engine import DiffusersEngine
from workers.engine import GenerateParams, RefineParams
from workers.memory import rss_mib


def check(entry: ModelEntry, settings: Settings, *, steps: int) -> dict[str, Any]:
    """Raises ConfigError or EngineError. ``refine_steps_run`` is of a refinement that skips half."""
    engine = DiffusersEngine(settings)
    began = time.perf_counter()
    engine.load([entry.name])
    load_s = time.perf_counter() - began
    common: dict[str, Any] = {"model": entry.name, "prompt": "a red circle", "seed": 0, "num_inference_steps": steps}
    drawn = engine.generate(GenerateParams(**common))
    refined = engine.refine(RefineParams(source=drawn.image, skipped_steps=1, total_steps=2, **common))
    is_cuda = engine.device == "cuda"
    return {
        "model": entry.name,
        "device": torch.cuda.get_device_name() if is_cuda else f"{engine.device} ({platform.machine()})",
        "size": f"{drawn.image.width}x{drawn.image.height}",
        "load_s": round(load_s, 2),
        "s_per_step": round(drawn.gpu_s / drawn.steps_run, 4),
        "steps_run": drawn.steps_run,
        "refine_steps_run": refined.steps_run,
        "device_peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if is_cuda else 0,
        "rss_mib": round(rss_mib()),
    }
