"""The engine over diffusers: catalogue, pipelines and residency put together."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from modm_tasks.errors import ConfigError, OutOfMemoryError
from modm_tasks.settings import Settings
from workers.catalogue import ModelEntry, find
from workers.engine import Drawn, GenerateParams, RefineParams, no_callback, start_step
from workers.options import check_options
from workers.pinning import VISIBLE
from workers.pipelines import Pair, draw, fewest_steps, load_pair
from workers.residency import Parking, Residency, device_budget, free_cached

log = logging.getLogger(__name__)

#: A GPU that the operating system knows: NVIDIA's driver, ROCm's.
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises ConfigError for a device that is not there, and for a GPU that is there but hidden, e.g. by a wrong index: a
    large model on a CPU instead would look like a hang.
    """
    if name == "auto" and not torch.cuda.is_available() and any(map(os.path.exists, _GPU_FILES)):
        visible = {k: os.environ[k] for k in VISIBLE if k in os.environ}
        raise ConfigError(
            f"this machine has a GPU but torch sees none ({visible or 'driver or build of torch'});"
            " MODM_WORKER__DEVICE=cpu draws on the CPU",
            field="device",
        )
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if has[kind]))
    if not has.get(name, False):
        raise ConfigError(f"worker.device = {name!r} is not there; available: {', '.join(k for k in has if has[k])}")
    return torch.device(name)


class DiffusersEngine:
    """See `engine.Engine`. Seeds give reproducible images: same request, seed, model and hardware, same pixels."""

    def __init__(self, settings: Settings, *, parking: Parking | None = None) -> None:
        self._settings, self._options = settings, settings.worker
        self._device = pick_device(self._options.device)
        self.device = self._device.type
        check_options(self._options, self._device)
        if self._options.threads:
            torch.set_num_threads(self._options.threads)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        budget = device_budget(self._device, self._options.memory_mib)
        self._residency = Residency(self._device, budget, parking=parking or self._parking())

    def load(self, models: Sequence[str]) -> None:
        for entry in (self._entry(name) for name in models):
            self._check_device(entry)
            self._residency.add(entry.name, partial(load_pair, entry, self._options, self._device))
        for name in models:
            self.probe(name)
        self._residency.measure_prices()
        log.info("models ready: %s; prices %s", ", ".join(self.resident()), self.swap_s())

    def generate(self, params: GenerateParams) -> Drawn:
        return self._run(params, start_share=(0, 1))

    def refine(self, params: RefineParams) -> Drawn:
        return self._run(params, start_share=(params.skipped_steps, params.total_steps), source=params.source)

    def prepare(self, model: str) -> float:
        return self._ensure(self._entry(model))[1]

    def resident(self) -> tuple[str, ...]:
        return self._residency.resident()

    def swap_s(self) -> dict[str, float]:
        return self._residency.prices_s()

    def free(self) -> None:
        free_cached(self._device)

    def probe(self, model: str) -> None:
        """As few real steps as it can, at the model's own size; the peak above the weights stays free from then on."""
        entry = self._entry(model)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        pair, _ = self._ensure(entry)
        before = torch.cuda.memory_allocated(self._device) if self.device == "cuda" else 0
        draw(pair, prompt="a warm-up", seed=0, steps=fewest_steps(pair.text), size=entry.size_px, on_step=no_callback)
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - before
            self._residency.working_bytes = max(self._residency.working_bytes, peak)

    def _parking(self) -> Parking:
        if self._options.offload != "none":
            return "none"
        # Quantised weights cannot be swapped tensor by tensor, and on a CPU a copy in host memory would free nothing.
        return "reload" if self._options.quantise or self.device == "cpu" else "host"

    def _run(self, params: GenerateParams, *, start_share: tuple[int, int], source: Any = None) -> Drawn:
        entry = self._entry(params.model)
        pair, load_s = self._ensure(entry)
        steps = max(entry.steps_for(params.num_inference_steps, self._settings), fewest_steps(pair.text))
        began = time.perf_counter()
        image, run = draw(
            pair,
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            guidance_scale=params.guidance_scale,
            seed=params.seed,
            steps=steps,
            size=params.size or entry.size_px,
            source=source,
            start=start_step(*start_share, steps),
            on_step=params.on_step,
        )
        return Drawn(image=image, model=entry.name, steps_run=run, gpu_s=time.perf_counter() - began, load_s=load_s)

    def _ensure(self, entry: ModelEntry) -> tuple[Pair, float]:
        try:
            return self._residency.ensure(entry.name)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"model {entry.name!r}: no room on the device for its weights") from error

    def _entry(self, name: str) -> ModelEntry:
        return find(name, self._settings.models_file)

    def _check_device(self, entry: ModelEntry) -> None:
        """Say before an hour of download that a GPU is too small."""
        if self.device != "cuda" or self._options.quantise or self._options.offload != "none":
            return
        have = (device_budget(self._device, self._options.memory_mib) or 0) / 2**30
        if entry.memory_gib > have:
            raise OutOfMemoryError(
                f"model {entry.name!r} needs about {entry.memory_gib:g} GiB and the device has {have:.1f}:"
                " use a smaller model, worker.quantise or worker.offload"
            )
