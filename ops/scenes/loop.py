"""The loop that every training stage shares: progress, learning rate, checkpoints, resuming after any interruption.

A stage is a set of modules, an optimiser and a function from (step, generators) to a loss. Every random number of
step *i* comes from generators seeded with (seed, stage, i), so nothing but weights, optimiser state and the step number
has to be kept, and a run that was interrupted ends in the same state as one that was not.
"""

from __future__ import annotations

import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """How long and how fast a stage trains; `decay` is the share of steps over which the rate falls to zero.

    `stop_at` ends a stage before its schedule does, for a model that is wanted unfinished.
    """

    name: str
    steps: int
    learning_rate: float
    seed: int = 0
    warmup: int = 100
    decay: float = 0.35
    weight_decay: float = 0.01
    ema: float = 0.998
    checkpoint_s: float = 60.0
    log_every: int = 25
    stop_at: int | None = None

    @property
    def end(self) -> int:
        return min(self.steps, self.stop_at or self.steps)


@dataclass(frozen=True)
class StepRandom:
    """The two generators of one step: numpy for which samples, torch for noise."""

    numpy: np.random.Generator
    torch: torch.Generator


def work_folder() -> Path:
    """Where checkpoints and evaluation pictures go: `MODM_SCENES_WORK`, else `build/scenes` (ignored by git)."""
    return Path(os.environ.get("MODM_SCENES_WORK", "build/scenes"))


StepFunction = Callable[[int, StepRandom], tuple[torch.Tensor, dict[str, float]]]


def step_random(seed: int, stage: str, step: int) -> StepRandom:
    """Generators that depend on nothing but their arguments."""
    numpy = np.random.default_rng((seed, zlib.crc32(stage.encode()), step))
    generator = torch.Generator().manual_seed(int(numpy.integers(2**62)))
    return StepRandom(numpy, generator)


def rate_at(step: int, config: StageConfig) -> float:
    """Warm-up, a flat middle and a cosine fall to zero: a run can be lengthened while it is on the flat part."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    start = config.steps * (1.0 - config.decay)
    if step <= start:
        return warm
    return warm * 0.5 * (1.0 + math.cos(math.pi * (step - start) / max(1.0, config.steps - start)))


def run_stage(
    config: StageConfig,
    modules: dict[str, nn.Module],
    step_fn: StepFunction,
    folder: Path,
    *,
    stop_after: int | None = None,
    fresh_from: dict[str, dict[str, torch.Tensor]] | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Trains until `config.end`, resuming from `folder`; returns the averaged (EMA) weights of every module.

    `stop_after` ends early after so many steps of this call, as an interruption would (used by tests).
    `fresh_from` gives first weights when no checkpoint exists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.pt"
    bundle = nn.ModuleDict(modules)
    if fresh_from:
        for name, state in fresh_from.items():
            modules[name].load_state_dict(state)
    parameters = [p for p in bundle.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    average = {k: v.detach().clone() for k, v in bundle.state_dict().items()}
    step = 0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        bundle.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        average, step = saved["average"], int(saved["step"])
        _say(config.name, f"resumes at step {step} of {config.end}")
    rank, world = rank_and_world()
    if world > 1:
        torch.distributed.barrier()  # nobody saves while another still reads the checkpoint
    bundle.train()
    first, began, saved_at = step, time.monotonic(), time.monotonic()
    while step < config.end and (stop_after is None or step - first < stop_after):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * rate_at(step, config)
        loss, report = step_fn(step, step_random(config.seed, config.name, step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        _share_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        _average(average, bundle, min(config.ema, (1 + step) / (10 + step)))
        if rank == 0 and (step % config.log_every == 0 or step == config.end):
            pace = (time.monotonic() - began) / (step - first)
            figures = " ".join(f"{k} {v:.4f}" for k, v in {"loss": loss.item(), **report}.items())
            _say(config.name, f"step {step}/{config.end} {figures} {pace:.3f} s/step")
        due = time.monotonic() - saved_at > config.checkpoint_s or step == config.end or stop_after is not None
        if rank == 0 and due:
            _save(path, bundle, optimiser, average, step)
            saved_at = time.monotonic()
    return split_state(average)


def rank_and_world() -> tuple[int, int]:
    """(0, 1) but under `python -m torch.distributed.run`, where every process computes its share of each batch."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _share_gradients(parameters: list[nn.Parameter]) -> None:
    """Averages gradients over the processes, which then all take the same step."""
    _, world = rank_and_world()
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def load_average(folder: Path, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """The averaged weights of a stage's newest checkpoint, per module."""
    saved = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
    return split_state(saved["average"])


def split_state(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{"module.weight": t} -> {"module": {"weight": t}}."""
    out: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        module, _, rest = key.partition(".")
        out.setdefault(module, {})[rest] = value
    return out


@contextmanager
def bf16() -> Iterator[None]:
    """bfloat16 autocast where the CPU (or GPU) computes it natively; float32 elsewhere, where it would be slower."""
    native = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "avx512_bf16" in _cpu_flags()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=native):
        yield


def _cpu_flags() -> str:
    global _FLAGS
    if _FLAGS is None:
        info = Path("/proc/cpuinfo")
        _FLAGS = next((x for x in info.read_text().splitlines() if x.startswith("flags")), "") if info.exists() else ""
    return _FLAGS


_FLAGS: str | None = None


def _average(average: dict[str, torch.Tensor], bundle: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for key, value in bundle.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value, 1.0 - decay)
            else:
                average[key].copy_(value)


def _save(
    path: Path, bundle: nn.Module, optimiser: torch.optim.Optimizer, average: dict[str, torch.Tensor], step: int
) -> None:
    """Written beside and renamed: an interruption while saving leaves the checkpoint before it whole."""
    temporary = path.with_suffix(".tmp")
    state = {"weights": bundle.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "step": step}
    torch.save(state, temporary)
    os.replace(temporary, path)


def _say(stage: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage}: {text}", file=sys.stderr, flush=True)
