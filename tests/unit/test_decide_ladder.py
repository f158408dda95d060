"""Ladder: edges, order, degraded form, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modm_tasks.errors import ConfigError
from modm_tasks.settings import RoutingSettings, Settings
from orchestrator.build import choose_ladder
from orchestrator.decisions.ladder import PUBLISHED, Ladder, Rung, load_ladder, parse
from vector_store.embedder import embedder_identity

FIXED = settings(derandomize=True, deadline=None, max_examples=80)


@pytest.mark.parametrize(
    ("similarity", "k"),
    [(0.2499, None), (0.25, 5), (0.2699, 5), (0.27, 10), (0.28, 15), (0.29, 25), (0.2999, 25), (0.30, 30), (1.0, 30)],
)
def test_published_ladder_at_its_edges(similarity: float, k: int | None) -> None:
    rung = PUBLISHED.lookup(similarity)
    assert (rung.skipped_steps if rung else None) == k


def test_parse_sorts_and_refuses_what_does_not_rise() -> None:
    assert [r.skipped_steps for r in parse(".95:30,.75:5,.85:15").rungs] == [5, 15, 30]
    for bad in ("", "x", ".9", ".9:5,.9:10", ".9:5,.8:10", ".9:0", ".9:50", "1.5:5"):
        with pytest.raises(ConfigError):
            parse(bad)


def test_lowered_moves_every_threshold_down_a_rung_and_keeps_k() -> None:
    down = parse(".95:30,.90:25,.85:15,.80:10,.75:5").lowered(1)
    assert down.threshold == pytest.approx(0.70)
    assert down.lookup(0.90) == Rung(min_similarity=0.90, skipped_steps=30)
    assert down.lookup(0.69) is None
    assert parse(".9:25").lowered(1).threshold == 0.9


@FIXED
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_more_similar_never_skips_less_and_lowering_never_skips_less(a: float, b: float, rungs: int) -> None:
    low, high = sorted((a, b))

    def k(ladder: Ladder, s: float) -> int:
        rung = ladder.lookup(s)
        return rung.skipped_steps if rung else 0

    assert k(PUBLISHED, low) <= k(PUBLISHED, high)
    assert k(PUBLISHED, low) <= k(PUBLISHED.lowered(rungs), low) <= 30


def test_files_are_read_and_their_faults_named(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    good = {"schema_version": 1, "embedder": "e", "refiner": "r", "large": "l", "num_inference_steps": 50, "alpha": 0.95,
            "rungs": [{"min_similarity": 0.5, "skipped_steps": 10}]}  # fmt: skip
    path.write_text(json.dumps(good))
    assert load_ladder(path).threshold == 0.5
    assert load_ladder(path).rungs[0].verify_floor is None
    path.write_text(json.dumps(good | {"rungs": [good["rungs"][0] | {"verify_floor": 0.61}]}))  # type: ignore[index,operator]
    assert load_ladder(path).rungs[0].verify_floor == 0.61
    for change in ({"schema_version": 2}, {"rungs": []}, {"rungs": [{"min_similarity": 0.5}]}, {"rungs": 3}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError):
            load_ladder(path)
    with pytest.raises(ConfigError, match="nothing"):
        load_ladder(tmp_path / "nothing.json")


def test_a_ladder_file_for_another_embedder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    data = {"schema_version": 1, "refiner": "r", "rungs": [{"min_similarity": 0.5, "skipped_steps": 10}]}

    def choose(**more: str) -> Ladder:
        path.write_text(json.dumps(data | more))
        return choose_ladder(Settings(embedder="fake", routing=RoutingSettings(ladder_file=path)))

    assert choose(embedder="fake").threshold == 0.5
    assert choose(embedder="fake", embedder_identity=embedder_identity("fake")).threshold == 0.5
    with pytest.raises(ConfigError, match=r"for 'scenes-clip', not for 'fake'"):
        choose(embedder="scenes-clip")
    with pytest.raises(ConfigError, match="no embedder that it names"):
        choose()
    with pytest.raises(ConfigError, match="other weights of 'fake'"):
        choose(embedder="fake", embedder_identity="fake-00000000")
