"""Draws many pictures with the shipped models through ordinary diffusers pipelines, in parallel, resumably.

Every picture is a file named by a hash of all that decides it (weights, prompt, seed, source, skipped steps), so an
evaluation that was interrupted, or repeated with the same weights, draws only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ops.scenes.export import DIFFUSION_FOLDER, STEPS

#: Pictures per pipeline call: enough to amortise overheads, small enough for the caches of a CPU core.
BATCH = 16


@dataclass(frozen=True)
class Job:
    """One picture: text to image, or (with `source`, a file) refined from step `skipped_steps`."""

    model: str
    prompt: str
    seed: int
    source: str | None = None
    skipped_steps: int = 0

    def path(self, folder: Path) -> Path:
        parts = (self.model, _fingerprint(self.model), self.prompt, self.seed, self.skipped_steps, self.source)
        return folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.png"


@lru_cache(maxsize=8)
def _fingerprint(model: str) -> str:
    digest = hashlib.sha256()
    folder = DIFFUSION_FOLDER / model
    for path in (*sorted(folder.rglob("*.safetensors")), folder / "modm.json"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Painter:
    """The text-to-image and image-to-image pipelines of one model, from one set of weights, on one CPU thread."""

    def __init__(self, model: str, *, threads: int = 1) -> None:
        import torch
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

        torch.set_num_threads(threads)
        folder = DIFFUSION_FOLDER / model
        self.settings: dict[str, Any] = json.loads((folder / "modm.json").read_text())
        self._text = AutoPipelineForText2Image.from_pretrained(
            str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        self._text.set_progress_bar_config(disable=True)
        self._image = AutoPipelineForImage2Image.from_pipe(self._text)
        self._image.set_progress_bar_config(disable=True)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, guidance: float | None = None) -> list[Image.Image]:
        """One picture a prompt, from noise."""
        out: list[Image.Image] = self._text(
            prompt=list(prompts), height=64, width=64, **self._common(seeds, guidance)
        ).images
        return out

    def refine(
        self, prompts: Sequence[str], seeds: Sequence[int], sources: Sequence[Image.Image], skipped_steps: int
    ) -> list[Image.Image]:
        """Every source noised to step `skipped_steps` and denoised towards its prompt from there."""
        strength = 1 - skipped_steps / STEPS
        out: list[Image.Image] = self._image(
            prompt=list(prompts), image=list(sources), strength=strength, **self._common(seeds, None)
        ).images
        return out

    def _common(self, seeds: Sequence[int], guidance: float | None) -> dict[str, Any]:
        import torch

        return {
            "num_inference_steps": STEPS,
            "guidance_scale": guidance or self.settings["guidance_scale"],
            "max_sequence_length": self.settings["max_sequence_length"],
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        }


_painter: dict[str, Painter] = {}


def _run(jobs: list[Job], folder: Path) -> int:
    """In a child process: one batch of jobs of one model and one depth."""
    model = jobs[0].model
    if model not in _painter:
        _painter[model] = Painter(model)
    painter = _painter[model]
    prompts, seeds = [j.prompt for j in jobs], [j.seed for j in jobs]
    if jobs[0].source is None:
        images = painter.draw(prompts, seeds)
    else:
        sources = [Image.open(j.source).convert("RGB") for j in jobs if j.source is not None]
        images = painter.refine(prompts, seeds, sources, jobs[0].skipped_steps)
    for job, image in zip(jobs, images, strict=True):
        path = job.path(folder)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        image.save(temporary, format="PNG", optimize=True)
        temporary.replace(path)
    return len(jobs)


def draw_all(jobs: Sequence[Job], folder: Path, *, processes: int = 2, label: str = "") -> list[Image.Image]:
    """The pictures of all jobs, in order; only missing files are drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, int, bool], list[Job]] = {}
    for job in dict.fromkeys(jobs):
        if not job.path(folder).exists():
            groups.setdefault((job.model, job.skipped_steps, job.source is None), []).append(job)
    batches = [g[i : i + BATCH] for g in groups.values() for i in range(0, len(g), BATCH)]
    total, done, began = sum(len(b) for b in batches), 0, time.monotonic()
    if batches:
        # One thread a process: two one-thread processes beat one two-thread process.
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            for count in pool.map(_run, batches, [folder] * len(batches)):
                done += count
                if done % (10 * BATCH) == 0 or done == total:
                    pace = (time.monotonic() - began) / done
                    print(f"{time.strftime('%H:%M:%S')} {label}: {done}/{total} {pace:.3f} s", file=sys.stderr)
    return [Image.open(job.path(folder)).convert("RGB") for job in jobs]
