"""What is in force now: the settings, overridden by the runtime control."""

from __future__ import annotations

from dataclasses import dataclass

from modm_tasks.cluster import Control
from modm_tasks.queues import Mode
from modm_tasks.settings import Settings
from orchestrator.decisions.allocation.paper import Variant


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Compared between looks: when they differ, the controller decides at once."""

    mode: Mode
    allocation: str
    variant: Variant
    static_large: int
    period_s: float
    bucket_s: float

    @classmethod
    def of(cls, settings: Settings, control: Control) -> Rules:
        ours = settings.controller
        return cls(
            mode=control.mode or settings.worker.mode,
            allocation=control.allocation or ours.allocation,
            variant=ours.variant,
            static_large=ours.static_large if control.static_large is None else control.static_large,
            period_s=control.period_s or ours.period_s,
            bucket_s=control.bucket_s or ours.bucket_s,
        )

    @property
    def forecasts(self) -> bool:
        """The paper plans for the window that was; ``slo`` for the one that comes."""
        return self.allocation == "slo"
