"""The table of the in-flight design, on the DiffusionDB vectors; skipped where they are absent."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.decisions import routing
from orchestrator.decisions.ladder import parse
from orchestrator.decisions.routing import FEATURES
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.experiments import fluid_bound_per_min, sweep, table
from orchestrator.simulator.run import Load, simulate, vectors
from orchestrator.simulator.similarity import VectorSimilarities

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "diffusiondb_minilm.npy"
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason="../shared/data is absent")
LADDER = parse(".95:30,.90:25,.85:15,.80:10,.75:5")
BURST = 0.0


@pytest.fixture(scope="module")
def source() -> VectorSimilarities:
    return vectors(DATA, warm=1000, ladder=LADDER)


def report(source: VectorSimilarities, rate: float, features: str = "", **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"gpus": 4, "large_s": 60.0, "small_s": 11.0, "ladder": LADDER}
    config = SimConfig(**(base | {"features": frozenset(f for f in features.split(",") if f)} | more))
    kind = "poisson" if rate else "burst"
    return simulate(config, source, Load(kind=kind, rate_per_min=rate, seed=42)).report()


@pytest.mark.parametrize(
    ("rate", "hit_rate", "served", "late"), [(6, 0.51, 5.8, 0.32), (10, 0.32, 5.5, 0.96), (BURST, 0.21, 4.9, None)]
)
def test_modm_rows_within_ten_percent(
    source: VectorSimilarities, rate: float, hit_rate: float, served: float, late: float | None
) -> None:
    found = report(source, rate)
    assert found["hit_rate"] == pytest.approx(hit_rate, rel=0.1)
    assert found["served_per_min"] == pytest.approx(served, rel=0.1)
    if late is not None:
        assert found["slo"]["violations_2x"] == pytest.approx(late, rel=0.1)


def test_large_only_row(source: VectorSimilarities) -> None:
    found = report(source, 6, policy="large-only")
    assert found["served_per_min"] == pytest.approx(4.0, rel=0.02)
    assert found["slo"]["violations_2x"] == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize(("rate", "hit_rate", "served", "late"), [(6, 0.63, 5.9, 0.007), (10, 0.63, 9.0, 0.63)])
def test_inflight_rows_are_matched_or_beaten(
    source: VectorSimilarities, rate: float, hit_rate: float, served: float, late: float
) -> None:
    found = report(source, rate, "inflight")
    assert found["hit_rate"] >= hit_rate - 0.005
    assert found["served_per_min"] >= served - 0.05
    assert found["slo"]["violations_2x"] <= late


def test_inflight_comes_near_the_fluid_bound_and_does_not_fall_when_more_is_offered(source: VectorSimilarities) -> None:
    bound = fluid_bound_per_min(SimConfig(gpus=4, large_s=60.0, small_s=11.0, ladder=LADDER), source)
    assert bound == pytest.approx(9.34, abs=0.01)
    served = [report(source, rate, "inflight")["served_per_min"] for rate in (10, 14, 20, 40, BURST)]
    assert served[-1] >= 0.98 * bound
    assert all(later >= 0.99 * earlier for earlier, later in pairwise(served))


def test_everything_together_comes_near_the_fluid_bound_and_does_not_fall_when_more_is_offered(
    source: VectorSimilarities,
) -> None:
    everything = {"policy": "modm-plus", "verify_share": 0.05}
    bound = fluid_bound_per_min(SimConfig(gpus=4, large_s=60.0, small_s=11.0, ladder=LADDER), source)
    found = [report(source, rate, ",".join(FEATURES), **everything) for rate in (10, 20, 40, BURST)]
    served = [f["served_per_min"] for f in found]
    assert served[-1] >= 0.95 * bound
    assert all(later >= 0.99 * earlier for earlier, later in pairwise(served))
    assert found[-1]["escalated"] < 0.01 * found[-1]["requests"]["done"]  # nothing is bought under saturation
    calm = report(source, 4, ",".join(FEATURES), **everything)
    assert calm["escalated"] > 0.02 * calm["requests"]["done"]


def test_sixteen_gpus(source: VectorSimilarities) -> None:
    big = {"gpus": 16, "large_s": 91.5, "small_s": 6.5}
    assert report(source, BURST, policy="large-only", **big)["served_per_min"] == pytest.approx(10.5, rel=0.02)
    assert report(source, BURST, **big)["served_per_min"] == pytest.approx(13.1, rel=0.1)
    assert report(source, BURST, "inflight", **big)["served_per_min"] >= 26.4


def test_a_bound_on_waiting_counted_from_now_undoes_inflight_reuse(source: VectorSimilarities) -> None:
    from_turn = report(source, BURST, "inflight")
    from_now = report(source, BURST, "inflight", wait_bound_from_turn=False)
    assert from_turn["gave_up_waiting"] == 0
    assert from_now["served_per_min"] < 0.7 * from_turn["served_per_min"]


def test_slo_breaks_at_most_half_of_what_the_published_policies_break(source: VectorSimilarities) -> None:
    base = SimConfig(gpus=4, large_s=60.0, small_s=10.8, ladder=LADDER, admit=True)
    cells = sweep(base, source, rates=[8], seeds=[42])
    late = {c.system: c.violations_2x for c in cells}
    for theirs in (late["modm-quality"], late["modm-throughput"]):
        assert theirs > 0.1
        assert late["slo"] <= theirs / 2
        assert late["slo, quality never lowered"] <= theirs / 2
        assert late["slo, published roles"] <= theirs
    assert table(cells).count("\n") == 1 + len(cells)


def test_plain_slack_order_is_late_more_often_than_the_order_that_yields(
    source: VectorSimilarities, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = {}
    for factor in (-1.0, routing.YIELD):
        monkeypatch.setattr(routing, "YIELD", factor)
        late[factor] = report(source, 8, "inflight,late-binding,deadline")["slo"]["violations_2x"]
    assert late[-1.0] == pytest.approx(0.25, abs=0.02)
    assert late[2.0] == pytest.approx(0.15, abs=0.02)
