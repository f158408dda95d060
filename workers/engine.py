"""What a worker needs of an image engine. Two implementations: `diffusers_engine` and the public double in `testing`.

An engine belongs to one process and one device and draws one image at a time; it is not thread safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

#: Called after every denoising step with (steps done, steps of this run). Whatever it raises ends the run at that step.
StepCallback = Callable[[int, int], None]


def no_callback(done: int, total: int) -> None:
    """A step callback that does nothing."""


@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    """One image from text. ``None`` means: as the model's catalogue entry says."""

    model: str
    prompt: str
    seed: int
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    on_step: StepCallback = no_callback


@dataclass(frozen=True, kw_only=True)
class RefineParams(GenerateParams):
    """One image from text and a cached image: SDEdit from step ``skipped_steps`` of ``total_steps``.

    The two numbers are the ladder's (k of T). A model that runs another number of steps n skips the same share of its
    own schedule, k * n / T, and always runs at least one step.
    """

    source: Image.Image
    skipped_steps: int
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A finished image. ``gpu_s`` covers the drawing, ``load_s`` what it took to make the model resident before."""

    image: Image.Image
    model: str
    steps_run: int
    gpu_s: float
    load_s: float = 0.0


class Engine(Protocol):
    """Draws images. Every method raises EngineError, or OutOfMemoryError when the device has no room."""

    device: str

    def load(self, models: Sequence[str]) -> None:
        """Make these models servable and run one real warm-up step of each. Idempotent."""

    def generate(self, params: GenerateParams) -> Drawn:
        """Draw from text."""

    def refine(self, params: RefineParams) -> Drawn:
        """Draw from text and image."""

    def prepare(self, model: str) -> float:
        """Make the model resident, whatever has to leave for it. Returns the seconds that took."""

    def resident(self) -> tuple[str, ...]:
        """Names of the models on the device now, the most recently used last."""

    def swap_s(self) -> dict[str, float]:
        """Measured seconds to make each known model resident; 0 where it stays beside the others."""

    def free(self) -> None:
        """Give back all memory that is not weights, after running out of it."""

    def probe(self, model: str) -> None:
        """One step of the model at its own size, to tell an ill device from a request that was too big."""


def start_step(skipped_steps: int, total_steps: int, own_steps: int) -> int:
    """First step that a refiner with ``own_steps`` runs, when the ladder says to skip k of T.

    k * n / T, rounded to the nearest step (exact when n = T), at most n - 1 so that one step always runs.
    Raises ValueError when a number is out of range.
    """
    if own_steps < 1 or total_steps < 1 or skipped_steps < 0:
        raise ValueError(f"steps out of range: skip {skipped_steps} of {total_steps}, run {own_steps}")
    return min(round(skipped_steps * own_steps / total_steps), own_steps - 1)
