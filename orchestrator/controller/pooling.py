"""Pooled roles as the default of ``slo``: where nobody said which mode, and every worker holds both models.

The mode stands in the runtime control, because workers follow it too (a large worker under published roles refines with
the large model). What this controller has put there it takes away again when another allocation is chosen, so that the
published policies run with the published roles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from modm_tasks.cluster import Control
from modm_tasks.ledger import Ledger
from modm_tasks.messages import WorkerStatus
from modm_tasks.settings import Settings

log = logging.getLogger(__name__)

MARK = "pooled_by_controller"


def choose(
    settings: Settings, control: Control, ready: Sequence[WorkerStatus], *, ours: bool
) -> Literal["pool", "unpool", "forget"] | None:
    """What to do about the mode; None = nothing. ``ours``: the mode in the control was put there by a controller."""
    slo = (control.allocation or settings.controller.allocation) == "slo"
    if control.mode is not None:
        if ours and control.mode != "pooled":
            return "forget"  # somebody else has spoken since
        return "unpool" if ours and not slo else None
    if ours:
        return "forget"
    said = "mode" in settings.worker.model_fields_set
    resident = bool(ready) and all({w.large_model, w.small_model} <= set(w.models) for w in ready)
    return "pool" if slo and not said and resident else None


def adjust(ledger: Ledger, settings: Settings, control: Control, ready: Sequence[WorkerStatus]) -> Control:
    """The control after the choice. Raises UnavailableError."""
    choice = choose(settings, control, ready, ours=bool(ledger.document(MARK)))
    if choice is None:
        return control
    ledger.document(MARK, choice == "pool")
    if choice == "forget":
        return control
    log.info("roles are %s", "pooled: every worker holds both models" if choice == "pool" else "as published again")
    return ledger.set_control(mode="pooled" if choice == "pool" else None)
