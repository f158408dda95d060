"""What an image costs on each worker: learned, else profiled, else guessed. Pure, but for ``profiled``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modm_tasks.messages import WorkerStatus
from modm_tasks.settings import Settings
from orchestrator.decisions.snapshot import WorkerSpeed
from orchestrator.device_profiles import LOCAL_FILE, load_profile
from orchestrator.model_names import canonical

if TYPE_CHECKING:
    from orchestrator.controller.observe import Readings

#: Seconds of a small image over those of a large one until both are measured: SDXL and SD3.5-L on an MI210, 16.5 s and
#: 91.5 s (modm-facts A9).
SMALL_SHARE = 16.5 / 91.5


def profiled(settings: Settings) -> dict[str, float]:
    """Seconds per step by model before anything is learned: the profile of the settings, else this machine's own.

    Raises NotFoundError, InvalidInputError: the settings name a profile that is not there, or is none.
    """
    name = settings.controller.profile or str(settings.home / LOCAL_FILE)
    if not settings.controller.profile and not (settings.home / LOCAL_FILE).is_file():
        return {}
    return load_profile(name).step_s()


def faster_small_s(readings: Readings, settings: Settings) -> float | None:
    """Seconds of a full image of the fallback small model: learned, else profiled. None = not set, or not known yet."""
    name = settings.slo.fallback_small_model
    if not name:
        return None
    for table in (readings.step_s, readings.prior_step_s):
        for known in (name, canonical(name, settings)):
            if table.get(known, 0.0) > 0:
                return float(table[known]) * settings.num_inference_steps
    return None


def worker_speeds(readings: Readings, settings: Settings) -> dict[str, WorkerSpeed]:
    """By worker, for those whose models' speeds are known."""
    total, found = settings.num_inference_steps, {}
    for w in readings.ready:
        large, small = model_step_s(readings, settings, w)
        if large > 0 and small > 0:
            found[w.worker] = WorkerSpeed(
                worker=w.worker, device=w.device_name or w.device, large_s=large * total, small_s=small * total
            )
    return found


def mean_speed(speeds: Sequence[WorkerSpeed]) -> tuple[float, float]:
    """Seconds of a large and a small image on a worker of the mean rate: harmonic means, since rates add up."""
    n = len(speeds)
    return n / sum(1 / w.large_s for w in speeds), n / sum(1 / w.small_s for w in speeds)


def model_step_s(readings: Readings, settings: Settings, worker: WorkerStatus | None = None) -> tuple[float, float]:
    """Seconds per step of the large and the small model: learned, else profiled, else guessed from the other, else 0.

    For a ``worker``: learned on devices of its name, else its machine's own profile, before what holds for all. Without the
    guess a cold system would wait for its first hit before it moves a single worker.

    A model may stand under the name of the settings or under its catalogue name, which the workers report.
    """
    tables = [readings.step_s, readings.prior_step_s]
    if worker is not None:
        learned = {model: s for (model, device), s in readings.device_step_s.items() if device == worker.device_name}
        tables = [learned, worker.profile_step_s, *tables]

    def find(names: set[str]) -> float:
        for table in tables:
            for name in sorted(names):
                if table.get(name, 0.0) > 0:
                    return float(table[name])
        return 0.0

    ready = readings.ready if worker is None else [worker]
    large = {settings.large_model, *(w.large_model for w in ready)}
    small = {settings.small_model, *(w.small_model for w in ready)}
    large_s, small_s = find(large), find(small)
    if not large_s and settings.slo.large_latency_s:
        large_s = settings.slo.large_latency_s / settings.num_inference_steps
    return large_s or small_s / SMALL_SHARE, small_s or large_s * SMALL_SHARE


def devices(speeds: Sequence[WorkerSpeed]) -> dict[str, dict[str, float]]:
    """By device name: its workers and its seconds per full image of both models."""
    found: dict[str, dict[str, float]] = {}
    for w in speeds:
        row = found.setdefault(w.device, {"workers": 0, "large_s": w.large_s, "small_s": w.small_s})
        row["workers"] += 1
    return found
