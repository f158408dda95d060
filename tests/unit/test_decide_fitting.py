"""Fitting of ladders, predictions and floors, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from modm_tasks.errors import InvalidInputError
from ops.calibration.fit import fit, relative_quality
from ops.calibration.floors import Refined, fit_floors
from ops.calibration.measure import Measured, Pair, plan_pairs
from orchestrator.decisions.fitting import (
    LEAST_FLAGGED,
    FittedRung,
    build_ladder,
    fit_floor,
    fit_prediction,
    judge_floor,
    lowest_similarity,
    on_rung,
    rungs_json,
)


def scored(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores around .7 where nothing failed, around .6 for the tenth that did."""
    rng = np.random.default_rng(seed)
    failed = rng.random(n) < 0.1
    return np.where(failed, rng.normal(0.60, 0.03, n), rng.normal(0.70, 0.03, n)), failed


def test_a_floor_flags_mostly_failures_also_among_images_it_has_not_seen() -> None:
    floor = fit_floor(*scored(2000, 1))
    assert floor is not None
    seen = judge_floor(*scored(2000, 1), floor)
    assert seen.precision is not None
    assert 0.5 < seen.precision < 0.56  # the highest floor that keeps half, with a standard error to spare
    unseen = judge_floor(*scored(2000, 2), floor)
    assert unseen.precision is not None
    assert unseen.precision > 0.4
    assert unseen.recall is not None
    assert unseen.recall > 0.85
    assert unseen.failures == int(scored(2000, 2)[1].sum())


def test_no_floor_where_scores_say_nothing_or_too_few_failed() -> None:
    rng = np.random.default_rng(3)
    assert fit_floor(rng.random(2000), rng.random(2000) < 0.02) is None
    few = np.arange(20) < LEAST_FLAGGED - 1
    assert fit_floor(np.linspace(0, 1, 20), few, precision=1.0) is None
    by_chance = np.arange(40) % 2 == 0  # half of the six lowest failed, as half of all did
    assert fit_floor(np.linspace(0, 1, 40), by_chance) is None
    nothing = judge_floor(np.array([0.5]), np.array([True]), None)
    assert (nothing.precision, nothing.recall, nothing.flagged) == (None, 0.0, 0)


def test_verification_is_reported_before_and_after() -> None:
    scores, failed = scored(4000, 4)
    refined = Refined(
        scores=scores, failed=failed, large_failed=np.zeros(4000, dtype=bool), held_out=np.arange(4000) % 2 == 1
    )
    floors, figures = fit_floors({30: refined})
    assert floors[30] is not None
    assert figures["right_before"] == pytest.approx(0.9, abs=0.02)
    assert figures["right_after"] > figures["right_of_kept"] > 0.98
    assert 0.05 < figures["drawn_again"] < 0.25
    assert figures["rungs"][0]["skipped_steps"] == 30
    few = Refined(**{n: getattr(refined, n)[:30] for n in ("scores", "failed", "large_failed", "held_out")})
    both, told = fit_floors({30: refined, 10: few})
    assert both[10] == pytest.approx(floors[30], abs=0.01)
    assert [r["own"] for r in told["rungs"]] == [True, False]


def synthetic(n: int = 400, seed: int = 0) -> Measured:
    """k = 10 keeps quality from similarity .3 on, k = 30 from .6 on; below, half of the score is lost. Images lie .1 lower
    than texts."""
    rng = np.random.default_rng(seed)
    pairs = [Pair(prompt=i, source=0, skipped_steps=k) for k in (10, 30) for i in range(n) for _ in range(2)]
    texts = rng.uniform(0.1, 1.0, len(pairs))
    similarity = texts - 0.1 + rng.normal(0, 0.01, len(pairs))
    needed = np.array([0.3 if p.skipped_steps == 10 else 0.6 for p in pairs])
    quality = np.where(similarity >= needed, 1.0, 0.5) * 0.3 + rng.normal(0, 0.01, len(pairs))
    return Measured(
        pairs=pairs, similarity=similarity, text_similarity=texts, scores=quality, quality=quality,
        large=np.full(n, 0.3),
    )  # fmt: skip


def test_the_ladder_finds_the_similarity_each_depth_needs() -> None:
    found = fit(synthetic(), alpha=0.95)
    by_k = {r["skipped_steps"]: r["min_similarity"] for r in found["rungs"]}
    assert by_k[10] == pytest.approx(0.3, abs=0.03)
    assert by_k[30] == pytest.approx(0.6, abs=0.03)
    assert found["prediction"]["slope"] == pytest.approx(1.0, abs=0.02)
    assert found["prediction"]["intercept"] == pytest.approx(-0.1, abs=0.02)
    assert found["hold_out"]["prediction_error"] == pytest.approx(0.01, abs=0.002)
    assert all(r["of_large"] > 0.9 and r["pairs"] > 20 for r in found["hold_out"]["rungs"])


def test_a_small_model_that_is_too_weak_gets_no_ladder() -> None:
    with pytest.raises(InvalidInputError, match=r"no depth keeps 0\.95"):
        fit(Measured(**(synthetic().__dict__ | {"quality": np.full(1600, 0.1)})), alpha=0.95)
    with pytest.raises(InvalidInputError, match="above 0"):
        relative_quality(Measured(**(synthetic().__dict__ | {"large": np.zeros(400)})))


def test_thresholds_rise_with_the_depth_even_where_noise_says_otherwise() -> None:
    similarity = np.linspace(0.2, 0.9, 400)
    measured = {10: (similarity, (similarity > 0.5) * 1.0), 20: (similarity, (similarity > 0.4) * 1.0)}
    rungs = build_ladder(measured, 0.95)
    assert [r.skipped_steps for r in rungs] == [20, 10]
    assert rungs[0].min_similarity > rungs[1].min_similarity
    assert lowest_similarity(similarity, np.zeros(400), 0.95) is None


def test_a_rung_is_judged_by_a_band_at_least() -> None:
    rungs = [FittedRung(0.62, 30, 1.0, 1), FittedRung(0.61, 25, 1.0, 1)]
    similarity = np.array([0.6, 0.615, 0.65, 0.68, 0.9])
    assert on_rung(similarity, rungs, 0).tolist() == [False, False, True, True, True]
    assert on_rung(similarity, rungs, 1).tolist() == [False, True, True, False, False]
    assert rungs_json(rungs, {30: 0.4, 25: None}) == [
        {"min_similarity": 0.62, "skipped_steps": 30, "verify_floor": 0.4},
        {"min_similarity": 0.61, "skipped_steps": 25},
    ]


def test_texts_that_are_all_alike_predict_the_mean() -> None:
    line = fit_prediction(np.full(10, 0.5), np.linspace(0.2, 0.4, 10))
    assert line["slope"] == 0.0
    assert line["intercept"] == pytest.approx(0.3)


def test_every_depth_sees_near_and_far_sources() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.random((64, 64))
    pairs = plan_pairs(similarity, (10, 30), 2)
    assert len(pairs) == 64 * 2 * 2
    order = np.argsort(np.argsort(-similarity, axis=1), axis=1)
    for k in (10, 30):
        ranks = [int(order[p.prompt, p.source]) for p in pairs if p.skipped_steps == k]
        assert set(ranks) == {0, 1, 2, 4, 8, 16, 32}
