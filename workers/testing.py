"""FakeEngine: a public test double of an image engine, without torch.

It draws a deterministic picture from prompt, seed, model and source within a millisecond, and takes as long as the
settings say (``worker.fake_large_s``, ``worker.fake_small_s``: seconds of a full image), in proportion to the steps
run, step by step, so that progress, cancelling and leases behave as with a real model.

The prompt stays readable in the picture: ``image.info["modm:prompt"]``, which the image store writes into PNG text
metadata, so that a fake embedder can tell what an image shows.

Two prompts are poison, for tests of fault handling: one that contains ``[[crash]]`` kills the process with SIGKILL in
its first step, as a broken GPU driver would; one that contains ``[[fail]]`` raises EngineError.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from modm_tasks.errors import EngineError
from modm_tasks.settings import Settings, get_settings
from workers.engine import Drawn, GenerateParams, RefineParams, start_step

PROMPT_KEY = "modm:prompt"
CRASH, FAIL = "[[crash]]", "[[fail]]"
_SIZE = (64, 64)


def picture(params: GenerateParams) -> Image.Image:
    """The fake image: a pure function of prompt, seed, model, size and source pixels. RGB, 8 bit."""
    width, height = params.size or _SIZE
    digest = hashlib.sha256(f"{params.model}\0{params.prompt}\0{params.negative_prompt}\0{params.seed}".encode())
    rng = np.random.default_rng(int.from_bytes(digest.digest()[:8], "little"))
    base = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
    if isinstance(params, RefineParams):
        source = params.source.convert("RGB").resize((width, height))
        base = Image.blend(base, source, min(0.9, params.skipped_steps / params.total_steps))
    base.info[PROMPT_KEY] = params.prompt
    return base


class FakeEngine:
    """See the module's text. ``large`` and ``small`` name the models whose time the settings give."""

    device = "fake"

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or get_settings()
        self._known: list[str] = []
        self._resident: list[str] = []
        self._clock = threading.Event()  # never set: waiting on it is an interruptible sleep

    def load(self, models: Sequence[str]) -> None:
        self._known = list(dict.fromkeys([*self._known, *models]))
        self._resident = self._known[-1:] if self._settings.worker.fake_swap_s else self._known

    def generate(self, params: GenerateParams) -> Drawn:
        return self._run(params, 0)

    def refine(self, params: RefineParams) -> Drawn:
        return self._run(params, start_step(params.skipped_steps, params.total_steps, self._steps(params)))

    def prepare(self, model: str) -> float:
        self._check(model)
        if model in self._resident:
            return 0.0
        began = time.perf_counter()
        self._clock.wait(self._settings.worker.fake_swap_s)
        self._resident = [model]
        return time.perf_counter() - began

    def resident(self) -> tuple[str, ...]:
        return tuple(self._resident)

    def swap_s(self) -> dict[str, float]:
        return dict.fromkeys(self._known, self._settings.worker.fake_swap_s)

    def free(self) -> None:
        """Nothing to free."""

    def probe(self, model: str) -> None:
        self._check(model)

    def _steps(self, params: GenerateParams) -> int:
        return params.num_inference_steps or self._settings.num_inference_steps

    def _check(self, model: str) -> None:
        if model not in self._known:
            raise EngineError(f"model {model!r} is not loaded; loaded: {', '.join(self._known) or 'none'}")

    def _run(self, params: GenerateParams, start: int) -> Drawn:
        load_s = self.prepare(params.model)
        if FAIL in params.prompt:
            raise EngineError(f"the prompt contains {FAIL}")
        worker = self._settings.worker
        full_s = worker.fake_large_s if params.model == self._settings.large_model else worker.fake_small_s
        steps = self._steps(params)
        run, began = steps - start, time.perf_counter()
        for done in range(1, run + 1):
            due = began + full_s * done / steps
            if (left := due - time.perf_counter()) > 0:
                self._clock.wait(left)
            if CRASH in params.prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            params.on_step(done, run)
        gpu_s = time.perf_counter() - began
        return Drawn(image=picture(params), model=params.model, steps_run=run, gpu_s=gpu_s, load_s=load_s)
