"""When the controller pools roles by itself."""

from __future__ import annotations

from typing import Any

import pytest

from modm_tasks.cluster import Control
from modm_tasks.messages import WorkerStatus
from modm_tasks.settings import ControllerSettings, Settings, WorkerSettings
from orchestrator.controller.pooling import choose


def settings(allocation: str, **worker: Any) -> Settings:
    return Settings(controller=ControllerSettings(allocation=allocation), worker=WorkerSettings(**worker))


def status(*models: str) -> WorkerStatus:
    return WorkerStatus(
        worker="w", gpu="0", host="h", pid=1, device="fake", models=models, large_model="l", small_model="s",
        embedder="fake", started_s=0.0,
    )  # fmt: skip


BOTH, ONE = [status("l", "s")], [status("l", "s"), status("s")]


@pytest.mark.parametrize(
    ("allocation", "worker", "control", "ready", "ours", "expected"),
    [
        ("slo", {}, {}, BOTH, False, "pool"),
        ("slo", {}, {}, ONE, False, None),  # a switch would cost a load
        ("slo", {}, {}, [], False, None),
        ("slo", {"mode": "roles"}, {}, BOTH, False, None),  # the settings say otherwise
        ("slo", {}, {"mode": "roles"}, BOTH, False, None),  # an operator says otherwise
        ("slo", {}, {"mode": "pooled"}, BOTH, True, None),
        ("slo", {}, {"mode": "pooled", "allocation": "modm-quality"}, BOTH, True, "unpool"),
        ("slo", {}, {"mode": "pooled", "allocation": "modm-quality"}, BOTH, False, None),  # an operator's pooling stays
        ("slo", {}, {"mode": "roles"}, BOTH, True, "forget"),
        ("modm-throughput", {}, {}, BOTH, False, None),
        ("modm-throughput", {}, {"allocation": "slo"}, BOTH, False, "pool"),
    ],
)
def test_choice(
    allocation: str,
    worker: dict[str, Any],
    control: dict[str, Any],
    ready: list[WorkerStatus],
    ours: bool,
    expected: str | None,
) -> None:
    made = settings(allocation, **worker)
    assert choose(made, Control.model_validate(control), ready, ours=ours) == expected
