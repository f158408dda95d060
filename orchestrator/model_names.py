"""Model names as the workers say them: `flux` is `FLUX.1-dev`. And the refusal of a run that names another pair.

The catalogue belongs to the workers' folder, which this one may not import, so the composition root hands its function
in. Without it (a library use, a test) a name stands for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modm_tasks.errors import InvalidInputError

if TYPE_CHECKING:
    from modm_tasks.settings import Settings

_canonical: list[Callable[[str, Settings], str]] = []


def use(canonical: Callable[[str, Settings], str]) -> None:
    """From now on names are resolved by ``canonical(name, settings)``."""
    _canonical[:] = [canonical]


def canonical(name: str, settings: Settings) -> str:
    """The catalogue's name for a name or alias; one that it does not know stays as it is."""
    return _canonical[0](name, settings) if _canonical else name


def named(settings: Settings) -> Settings:
    """The settings with both models by their catalogue names, which is what completions and workers are counted under."""
    pair = {role: canonical(getattr(settings, role), settings) for role in ("large_model", "small_model")}
    return settings.model_copy(update=pair)


def check_pair(status: dict[str, Any], settings: Settings, *, large: str | None, small: str | None) -> None:
    """A run that names its models must not be measured on others.

    ``status``: of the orchestrator. What its workers serve counts; where none is ready, what it is set to. Raises
    InvalidInputError (exit 2).
    """
    for role, wanted in (("large", large), ("small", small)):
        if wanted is None:
            continue
        serving = {str(w[f"{role}_model"]) for w in status["workers"]} or {status["models"][role]}
        names = {canonical(name, settings) for name in serving}
        if names != {canonical(wanted, settings)}:
            raise InvalidInputError(
                f"the workers serve {', '.join(sorted(names))} as the {role} model, not {canonical(wanted, settings)}",
                field=f"{role}_model",
            )
