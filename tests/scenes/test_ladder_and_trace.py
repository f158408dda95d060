"""The shipped ladder, trace and warm cache, and the functions that made them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from ops.scenes.calibrate import LADDER, Rung, build_ladder, lowest_similarity, read_ladder, rung_depth
from ops.scenes.captions import parse_caption
from ops.scenes.classifier import attribute_accuracy
from ops.scenes.embed import embed_images, embed_texts
from ops.scenes.holdout import CHAIN_LENGTH, chains, read_eval_prompts, trained_scenes
from ops.scenes.trace import REQUESTS, TRACE, WARM, WARM_CACHE, statistics, stream
from ops.scenes.trace_vectors import VECTORS


def test_the_shipped_ladder_is_a_ladder() -> None:
    ladder = json.loads(LADDER.read_text())
    assert ladder["schema_version"] == 1
    assert (ladder["embedder"], ladder["refiner"], ladder["large"]) == ("scenes-clip", "scenes-small", "scenes-large")
    rungs = ladder["rungs"]
    assert rungs
    for upper, lower in itertools.pairwise(rungs):
        assert upper["min_similarity"] > lower["min_similarity"]
        assert upper["skipped_steps"] > lower["skipped_steps"]
    assert all(0 < r["skipped_steps"] < ladder["num_inference_steps"] for r in rungs)
    assert [vars(r)["skipped_steps"] for r in read_ladder()] == [r["skipped_steps"] for r in rungs]


def test_the_threshold_is_where_quality_falls() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.uniform(0.2, 0.8, 3000)
    quality = np.where(similarity > 0.5, 1.0, 0.6)
    found = lowest_similarity(similarity, quality, 0.97)
    assert found is not None
    assert found[0] == pytest.approx(0.5, abs=0.02)
    assert lowest_similarity(similarity, quality * 0.9, 0.97) is None


def test_a_noisy_estimate_does_not_turn_the_ladder_upside_down() -> None:
    similarity = np.linspace(0.2, 0.8, 600)
    measured = {
        5: (similarity, (similarity > 0.5) * 1.0),
        10: (similarity, (similarity > 0.4) * 1.0),
        15: (similarity, np.zeros(600)),
    }
    rungs = build_ladder(measured, 0.97)
    assert [r.skipped_steps for r in rungs] == [10, 5]
    assert rungs[0].min_similarity > rungs[1].min_similarity


def test_rung_depth_edges() -> None:
    rungs = [Rung(0.7, 20, 1.0, 9), Rung(0.5, 5, 1.0, 9)]
    assert [rung_depth(rungs, s) for s in (0.49, 0.5, 0.69, 0.7, 1.0)] == [0, 5, 5, 20, 20]


def test_evaluation_prompts_are_unseen() -> None:
    prompts = read_eval_prompts()
    trained = trained_scenes()
    assert not any(p.scene in trained for p in prompts)
    assert sum(p.chain >= 0 for p in prompts) >= 500
    assert all(p.scene.held_out == (p.chain < 0) for p in prompts)
    calibration = {p.scene for p in chains(202, 5)}
    assert len(calibration) == 5 * CHAIN_LENGTH
    assert not calibration & {p.scene for p in prompts}


def test_the_bundled_trace_is_what_the_generator_makes() -> None:
    rows = [json.loads(line) for line in TRACE.read_text().splitlines()]
    wanted = stream()[WARM:]
    assert len(rows) == REQUESTS >= 200
    assert [(r["prompt"], r["seed"], r["client"]) for r in rows] == [(w.prompt, w.seed, w.client) for w in wanted]
    arrivals = [r["arrival_s"] for r in rows]
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)


def test_the_trace_has_the_statistics_of_real_users() -> None:
    prompts = [r.prompt for r in stream()]
    measured = statistics(prompts, embed_texts(prompts), WARM)
    assert measured["exact_repeats"] == pytest.approx(0.13, abs=0.04)
    assert measured["cosine_0.9"] == pytest.approx(0.43, abs=0.06)
    assert measured["cosine_0.8"] == pytest.approx(0.56, abs=0.08)
    assert measured["lag_p10"] == pytest.approx(2, abs=1)
    assert measured["lag_p50"] == pytest.approx(8, abs=5)
    assert 100 <= measured["lag_p90"] <= 400


def test_the_warm_cache_shows_its_captions_and_serves_the_trace() -> None:
    rows = [json.loads(line) for line in (WARM_CACHE / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == WARM == len(list(WARM_CACHE.glob("*.png")))
    assert {r["model"] for r in rows} == {"scenes-large"}
    images = [Image.open(WARM_CACHE / r["file"]).convert("RGB") for r in rows]
    assert all(image.size == (64, 64) for image in images)
    scenes = [parse_caption(r["prompt"]) for r in rows]
    assert attribute_accuracy(images, scenes)["mean"].mean() > 0.9
    asked = [json.loads(line)["prompt"] for line in TRACE.read_text().splitlines()]
    best = (embed_texts(asked) @ embed_images(images).T).max(1)
    lowest = read_ladder()[-1].min_similarity
    assert (best >= lowest).mean() > 0.5


def test_the_vectors_of_the_trace_are_those_of_its_prompts_and_pictures() -> None:
    warm = [json.loads(line) for line in (WARM_CACHE / "captions.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in warm] + [json.loads(line)["prompt"] for line in TRACE.read_text().splitlines()]
    with np.load(VECTORS) as found:
        assert found["text"].shape == found["image"].shape == (WARM + REQUESTS, 128)
        some = slice(WARM - 3, WARM + 3)
        assert found["text"][some] == pytest.approx(embed_texts(prompts[some]), abs=2e-3)
        with Image.open(WARM_CACHE / warm[5]["file"]) as picture:
            assert found["image"][5] == pytest.approx(embed_images([picture])[0], abs=2e-3)
        # Each picture resembles its own prompt more than another one's.
        own = (found["text"] * found["image"]).sum(1, dtype=np.float32)
        other = (found["text"] * np.roll(found["image"], 7, axis=0)).sum(1, dtype=np.float32)
        assert (own > other).mean() > 0.97
