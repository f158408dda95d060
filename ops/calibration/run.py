"""One calibration from settings to a ladder file."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modm_tasks import __version__
from modm_tasks.errors import ConfigError, InvalidInputError
from modm_tasks.settings import Settings
from ops.calibration.draw import Drawer
from ops.calibration.fit import fit
from ops.calibration.measure import Measurement, Metric, Say
from orchestrator.traces.load import load_trace
from vector_store.embedder import load_embedder
from workers.catalogue import named
from workers.runtime import make_engine

DEPTHS = (5, 10, 15, 20, 25, 30)
ALPHA = 0.95
LEAST_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to calibrate on. ``depths``: of the settings' number of steps; ``pairs``: sources for each prompt and depth."""

    prompts: Path
    output: Path
    work: Path
    alpha: float = ALPHA
    metric: str = "clip"
    depths: Sequence[int] = DEPTHS
    num_prompts: int = 0
    pairs: int = 2
    least: int = 25
    seed: int = 1000


def load_metric(name: str) -> Metric | None:
    """``clip`` (None), or what ``module:callable`` names. Raises ConfigError."""
    if name == "clip":
        return None
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"metric {name!r} is neither clip nor module:callable: {error}", field="metric") from error
    if not callable(found):
        raise ConfigError(f"metric {name!r} cannot be called", field="metric")
    metric: Metric = found
    return metric


def read_prompts(plan: Plan) -> list[str]:
    """Different prompts in file order. Raises TraceError, or InvalidInputError for too few."""
    found = list(dict.fromkeys(row.prompt for row in load_trace(plan.prompts).rows))
    found = found[: plan.num_prompts or None]
    if len(found) < LEAST_PROMPTS:
        raise InvalidInputError(
            f"{plan.prompts.name} holds {len(found)} different prompts; at least {LEAST_PROMPTS} are needed",
            field="prompts",
        )
    return found


def check(plan: Plan, settings: Settings) -> None:
    """Before anything is loaded. Raises InvalidInputError."""
    if not 0 < plan.alpha <= 1:
        raise InvalidInputError(f"alpha must be above 0 and at most 1, not {plan.alpha:g}", field="alpha")
    if not plan.depths or not all(0 < k < settings.num_inference_steps for k in plan.depths):
        raise InvalidInputError(f"depths must lie within 1..{settings.num_inference_steps - 1}", field="depths")
    if not plan.output.absolute().parent.is_dir():
        raise InvalidInputError(f"no folder {plan.output.absolute().parent}", field="output")


def calibrate(settings: Settings, plan: Plan, say: Say) -> dict[str, Any]:
    """Measure, fit, write the ladder file (by a rename), and return its content."""
    check(plan, settings)
    metric, prompts, settings = load_metric(plan.metric), read_prompts(plan), named(settings)
    engine = make_engine(settings)
    engine.load(tuple(dict.fromkeys((settings.large_model, settings.small_model))))
    embedder = load_embedder(settings.embedder, "cpu" if engine.device == "fake" else engine.device)
    drawer = Drawer(
        engine, plan.work, large=settings.large_model, small=settings.small_model,
        total_steps=settings.num_inference_steps,
    )  # fmt: skip
    measurement = Measurement(drawer, embedder, metric, say)
    measured = measurement.run(prompts, depths=plan.depths, per_depth=plan.pairs, seed=plan.seed)
    ladder = {
        "schema_version": 1,
        "embedder": settings.embedder,
        "embedder_identity": embedder.identity,
        "refiner": settings.small_model,
        "large": settings.large_model,
        "num_inference_steps": settings.num_inference_steps,
        "alpha": plan.alpha,
        "metric": plan.metric,
        "prompts": {"n": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()},
        "made_by": f"modm {__version__}",
        **fit(measured, alpha=plan.alpha, least=plan.least),
    }
    part = plan.output.with_name(f".{plan.output.name}.part")
    part.write_text(json.dumps(ladder, indent=2) + "\n", encoding="utf-8")
    part.replace(plan.output)
    return ladder
