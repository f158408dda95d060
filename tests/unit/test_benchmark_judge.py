"""What the benchmarks on the real stack compute from images and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ops.benchmarks import ablation, ablation_table, diversity, generations, judge
from ops.scenes.captions import parse_caption
from ops.scenes.render import render
from orchestrator.decisions.ladder import parse
from orchestrator.decisions.routing import FEATURES

PROMPTS = [
    "a large red circle on the left on a plain white background",
    "a small green square in the centre, a striped gray background",
]


def test_renderings_are_right_and_a_wrong_prompt_is_not() -> None:
    images = [render(parse_caption(p), 3) for p in PROMPTS]
    assert judge.accuracy(images, PROMPTS).tolist() == [1.0, 1.0]
    assert judge.accuracy(images, PROMPTS[::-1]).max() < 0.7


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, (20_000, 3))
    assert judge.frechet(base, base) == pytest.approx(0.0, abs=1e-6)
    moved = judge.frechet(base, base + np.array([2.0, 0.0, 0.0]))
    assert moved == pytest.approx(4000.0, rel=1e-6)
    wider = judge.frechet(base, rng.normal(0, 3, (20_000, 3)))
    assert wider == pytest.approx(1000 * 3 * (3 - 1) ** 2, rel=0.05)


def test_pairwise_similarity() -> None:
    same, apart = np.array([[1.0, 0.0]] * 3), np.eye(2)
    assert judge.pairwise_similarity(same) == pytest.approx(1.0)
    assert judge.pairwise_similarity(apart) == pytest.approx(0.0)
    assert np.isnan(judge.pairwise_similarity(apart[:1]))


def test_every_mechanism_has_a_run_of_its_own_folder(tmp_path: Path) -> None:
    assert {s.features for s in ablation.SYSTEMS} >= set(FEATURES)
    assert len({ablation.folder_of(tmp_path, s) for s in ablation.SYSTEMS}) == len(ablation.SYSTEMS)


def run(speed: float, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "requests": {"submitted": 40, "done": 40}, "served_per_min": speed, "hit_rate": 0.5, "clip_score": 0.7,
        "accuracy": 0.98, "refined": {"n": 20, "wrong": 1}, "escalated": {"n": 1, "wrong": 0},
        "latency_s": {"p50": 1.0, "p99": 2.0}, "seconds": {"large": 1.0, "small": 0.2}, "prompts": PROMPTS,
        "machine": {"cpu": "c"},
    }  # fmt: skip
    return base | more


def test_runs_are_gathered_into_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    folders = []
    for name, speeds in (("large-only", (100.0, 110.0)), ("modm", (210.0,))):
        folder = tmp_path / name
        folder.mkdir()
        folders.append((name, folder))
        for n, speed in enumerate(speeds):
            (folder / f"{n}.json").write_text(json.dumps(run(speed)))
            np.savez_compressed(folder / f"{n}.npz", vectors=rng.normal(size=(40, 128)).astype(np.float32))
    found = ablation_table.gather([*folders, ("not run", tmp_path / "not run")], workers=2)
    large, modm = found["systems"]
    assert (large["served_per_min"], large["repeats"]) == ({"mean": 105.0, "sd": 7.0711}, 2)
    assert (modm["speedup"], modm["refined_right"], modm["lost"]) == (2.0, 0.95, 0)
    assert found["frechet_of_renderings"] < modm["frechet"]
    ablation_table.write(tmp_path, found)
    assert found["fluid_bound_per_min"] == 120.0  # the two prompts are unlike: no request has a source
    assert "| modm | 210.0 ± 0.0 | 2.0 | 1.75 |" in (tmp_path / "ablation.md").read_text()
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    lost = ablation_table.gather([("modm", folders[1][1])], workers=2)["systems"][0]
    assert lost["speedup"] is None


def test_the_fluid_bound_takes_the_best_rung_of_any_earlier_request() -> None:
    ladder = parse(".99:30")
    bound = ablation_table.fluid_bound_per_min([PROMPTS[0]] * 4, ladder, large_s=1.0, small_s=0.5, workers=2)
    assert bound == pytest.approx(60 * 2 * 4 / (1.0 + 3 * 0.5 * 0.4))


def test_the_depth_limit_is_where_quality_falls() -> None:
    rows: list[dict[str, Any]] = [
        {"depth": 0, "of_fresh": None},
        {"depth": 1, "of_fresh": 1.0},
        {"depth": 2, "of_fresh": 0.995},
    ]
    # A source of depth 1 makes an image of depth 2, the deepest that kept its quality.
    assert generations.deepest(rows) == 1
    assert generations.deepest([*rows, {"depth": 3, "of_fresh": 0.97}, {"depth": 4, "of_fresh": 1.0}]) == 1


def test_diversity_table_shows_what_was_measured() -> None:
    row = {
        "system": "modm", "pairwise_similarity": {"mean": 0.98, "se": 0.001}, "pixel_distance": {"mean": 0.05, "se": 0.002},
        "mean_skipped_steps": None, "accuracy": 0.99, "served_per_min": 293.8,
    }  # fmt: skip
    assert "| modm | 0.980 ± 0.001 | 0.050 ± 0.002 | - | 0.9900 | 294 |" in diversity.markdown([row])
