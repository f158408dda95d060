"""The simulated workloads: arrivals of a service, and a bound that knows images from texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ops.benchmarks import workloads
from ops.benchmarks.workloads import RATE_PER_MIN, TEXT_LADDER, Workload
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.experiments import fluid_bound_per_min
from orchestrator.simulator.similarity import VectorSimilarities

BASE = SimConfig(gpus=1, large_s=60.0, small_s=10.0, ladder=TEXT_LADDER)
SAME = np.ones((4, 2), dtype=np.float32)


def test_the_bound_takes_what_images_offer_not_what_their_prompts_do() -> None:
    alike = VectorSimilarities(SAME, warm=1, threshold=0.75)
    assert fluid_bound_per_min(BASE, alike) == pytest.approx(60 / 4)  # k = 30 of 50: four tenths of ten seconds
    other = VectorSimilarities(SAME, warm=1, threshold=0.75, image=SAME * np.array([1, -1], dtype=np.float32))
    assert fluid_bound_per_min(BASE, other) == pytest.approx(1.0)


def test_arrivals_of_a_service_keep_their_bursts_at_another_rate(tmp_path: Path) -> None:
    rows = ["gmt_create,x", *(f"2024-11-15 16:{minute:02}:00,1" for minute in (30, 0, 1, 2, 50))]
    (tmp_path / "requests.csv").write_text("\n".join(rows), encoding="utf-8")
    times = workloads.service_arrivals(tmp_path / "requests.csv", 4)
    assert times == pytest.approx([0.0, 0.8, 1.6, 24.0])
    assert len(times) / times[-1] * 60 == pytest.approx(RATE_PER_MIN)


def test_a_row_for_each_system_and_throughput_by_load_where_that_can_be_set() -> None:
    rng = np.random.default_rng(1)
    source = VectorSimilarities(rng.standard_normal((40, 3)).astype(np.float32), warm=10, threshold=0.75)
    poisson = Workload(name="a", source=source, ladder=TEXT_LADDER)
    recorded = Workload(name="b", source=source, ladder=TEXT_LADDER, arrivals=[6.0 * i for i in range(30)])
    lines = workloads.table([poisson, recorded]).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:10]] == ["large-only", "modm", "modm + inflight", "modm-plus"] * 2
    assert [line[:5] for line in lines if line.startswith("- ")] == ["- a: "]
