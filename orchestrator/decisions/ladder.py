"""The ladder: how many of the T denoising steps a cached image saves, by its similarity to the prompt."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from modm_tasks.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rung:
    """From ``min_similarity`` (cosine) on, ``skipped_steps`` of T are skipped.

    ``verify_floor``: CLIP score below which a refined image of this rung is mostly a failure; None = not calibrated.
    """

    min_similarity: float
    skipped_steps: int
    verify_floor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Rungs from the lowest similarity up; k rises with it. Belongs to one (embedder, refiner)."""

    rungs: tuple[Rung, ...]
    num_inference_steps: int = 50
    embedder: str = ""
    refiner: str = ""
    #: Name and checkpoint hash of the embedder; "" where the file does not say.
    embedder_identity: str = ""
    #: Text-to-image cosine expected of an image whose prompt has text-to-text cosine s: slope * s + intercept, fitted by
    #: the calibration of the embedder; (1, 0) where it was not fitted, which suits text-to-text ladders.
    prediction: tuple[float, float] = (1.0, 0.0)

    def predict(self, text_similarity: float) -> float:
        """Expected text-to-image cosine, within 0..1."""
        slope, intercept = self.prediction
        return min(1.0, max(0.0, slope * text_similarity + intercept))

    def __post_init__(self) -> None:
        if not self.rungs:
            raise ConfigError("a ladder needs at least one rung", field="ladder")
        for low, high in pairwise(self.rungs):
            if not (low.min_similarity < high.min_similarity and low.skipped_steps < high.skipped_steps):
                raise ConfigError(
                    "ladder: similarity and skipped steps must both rise from rung to rung", field="ladder"
                )
        for rung in self.rungs:
            if not (0 <= rung.min_similarity <= 1 and 0 < rung.skipped_steps < self.num_inference_steps):
                raise ConfigError(
                    f"ladder: rung {rung.min_similarity}:{rung.skipped_steps} is outside 0..1 or 1..T-1", field="ladder"
                )

    @property
    def threshold(self) -> float:
        """The lowest similarity that is a hit."""
        return self.rungs[0].min_similarity

    def lookup(self, similarity: float) -> Rung | None:
        """The highest rung at or below this similarity; None = miss."""
        index = self.reached(similarity)
        return self.rungs[index - 1] if index else None

    def reached(self, similarity: float) -> int:
        """How many rungs a similarity reaches; 0 = miss."""
        return bisect_right([r.min_similarity for r in self.rungs], similarity)

    def lowered(self, rungs: int) -> Ladder:
        """Every threshold down by so many rungs' distance: the degraded form, which never skips more at the top."""
        if rungs <= 0 or len(self.rungs) < 2:
            return self
        sims = [r.min_similarity for r in self.rungs]
        gap = sims[1] - sims[0]
        lower = [max(0.0, sims[0] - gap * (rungs - i)) for i in range(rungs)] + sims
        shifted = zip(lower, self.rungs, strict=False)
        kept = tuple(replace(r, min_similarity=s) for s, r in shifted)
        return replace(self, rungs=kept)


def _ladder(pairs: list[tuple[float, int]], **more: Any) -> Ladder:
    return Ladder(rungs=tuple(Rung(min_similarity=s, skipped_steps=k) for s, k in sorted(pairs)), **more)


#: Paper figure 5b, for CLIP ViT-L/14 on raw prompts. k = 20 is listed in the paper and used nowhere (facts A2).
PUBLISHED = _ladder([(0.25, 5), (0.27, 10), (0.28, 15), (0.29, 25), (0.30, 30)], embedder="ViT-L-14/openai")


def parse(text: str, num_inference_steps: int = 50) -> Ladder:
    """``".95:30,.90:25"`` to a ladder. Raises ConfigError."""
    try:
        pairs = [(float(s), int(k)) for s, k in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise ConfigError(f"ladder {text[:80]!r} must look like .95:30,.90:25", field="ladder") from None
    return _ladder(pairs, num_inference_steps=num_inference_steps)


def _rung(row: dict[str, Any]) -> Rung:
    floor = row.get("verify_floor")
    return Rung(
        min_similarity=float(row["min_similarity"]),
        skipped_steps=int(row["skipped_steps"]),
        verify_floor=None if floor is None else float(floor),
    )


def load_ladder(path: Path) -> Ladder:
    """Read a ladder file (schema version 1). Raises ConfigError that names the file and the field."""
    try:
        data = json.loads(path.read_text())
        if data["schema_version"] != 1:
            raise ConfigError(f"{path.name}: schema_version must be 1", field="schema_version")
        rungs = tuple(sorted((_rung(r) for r in data["rungs"]), key=lambda r: r.min_similarity))
        more: dict[str, Any] = {k: str(data.get(k, "")) for k in ("embedder", "refiner", "embedder_identity")}
        fitted = data.get("prediction") or {"slope": 1.0, "intercept": 0.0}
        more["prediction"] = (float(fitted["slope"]), float(fitted["intercept"]))
        return Ladder(rungs=rungs, num_inference_steps=int(data.get("num_inference_steps", 50)), **more)
    except OSError as error:
        raise ConfigError(f"ladder file {path}: {error.strerror}", field="ladder_file") from error
    except KeyError as error:
        raise ConfigError(f"ladder file {path.name}: field {error} is missing", field="ladder_file") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"ladder file {path.name}: {error}", field="ladder_file") from error
