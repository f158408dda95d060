"""Draws calibration images with the project's own engine, each once: a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from modm_tasks.image_store import decode_image, to_png
from workers.engine import Engine, GenerateParams, RefineParams


class Drawer:
    """Images are files in ``folder``, named by all that decides them but the weights: new weights need a new folder."""

    def __init__(self, engine: Engine, folder: Path, *, large: str, small: str, total_steps: int) -> None:
        self.engine, self.folder = engine, folder
        self.large, self.small, self.total_steps = large, small, total_steps
        folder.mkdir(parents=True, exist_ok=True)

    def generate(self, prompt: str, seed: int) -> Path:
        """By the large model, from noise."""
        given = GenerateParams(model=self.large, prompt=prompt, seed=seed, num_inference_steps=self.total_steps)
        return self._once([self.large, prompt, seed], lambda: self.engine.generate(given).image)

    def refine(self, prompt: str, seed: int, source: Path, skipped_steps: int) -> Path:
        """By the small model, from step ``skipped_steps`` of ``source``."""

        def draw() -> Image.Image:
            params = RefineParams(
                model=self.small, prompt=prompt, seed=seed, source=self.read(source), skipped_steps=skipped_steps,
                total_steps=self.total_steps, num_inference_steps=self.total_steps,
            )  # fmt: skip
            return self.engine.refine(params).image

        return self._once([self.small, prompt, seed, source.name, skipped_steps], draw)

    @staticmethod
    def read(path: Path) -> Image.Image:
        """A drawn image, RGB."""
        return decode_image(path.read_bytes(), formats=("PNG",), what=path.name)

    def _once(self, what: list[Any], draw: Callable[[], Image.Image]) -> Path:
        name = hashlib.sha256(json.dumps([*what, self.total_steps]).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.png"
        if not path.is_file():
            part = path.with_suffix(".part")
            part.write_bytes(to_png(draw()))
            part.replace(path)
        return path
