"""The same prompt again: the stored image where the seed is the same, else a variation of its own. Real router and cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modm_tasks.messages import Decision, Route, State
from orchestrator.sources import FEW
from tests.conftest import SettingsFactory
from tests.support.rig import FIRST, LARGE, SECOND, SMALL, MakeRig, Rig, rigs

REPEATS = "repeats"


@pytest.fixture
def make_rig(settings: SettingsFactory, tmp_path: Path) -> Iterator[MakeRig]:
    ladder = tmp_path / "ladder.json"
    rungs = [{"min_similarity": s, "skipped_steps": k} for s, k in ((0.5, 10), (0.95, 30))]
    ladder.write_text(json.dumps({"schema_version": 1, "embedder": "fake", "rungs": rungs}))
    routing = {"ladder_file": ladder, "features": REPEATS}
    yield from rigs(lambda **more: settings(**{"routing": routing} | more))


def drawn(rig: Rig, prompt: str = FIRST, **fields: Any) -> str:
    """An image of the large model in the cache."""
    request_id = rig.submit(prompt, cache="refresh", **fields)
    assert rig.draw(LARGE) == request_id
    return request_id


def decision(rig: Rig, **fields: Any) -> Decision:
    found = rig.get(rig.submit(FIRST, **fields)).decision
    assert found is not None
    return found


def test_a_seed_that_was_drawn_is_answered_at_once_with_the_stored_image(make_rig: MakeRig) -> None:
    rig = make_rig()
    first = drawn(rig, seed=7)
    repeat = rig.get(rig.submit(FIRST, seed=7))
    assert repeat.state is State.DONE
    assert repeat.decision is not None
    assert (repeat.decision.route, repeat.decision.source_id) == (Route.STORED, first)
    assert rig.service.image_uri(repeat.id) == rig.service.image_uri(first)


def test_a_seed_that_was_answered_by_refining_has_the_same_answer_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    drawn(rig, SECOND)
    refined = rig.submit(FIRST, seed=7)
    assert rig.draw(SMALL) == refined
    assert rig.get(refined).completion.depth == 1  # type: ignore[union-attr]
    assert (decision(rig, seed=7).route, decision(rig, seed=7).source_id) == (Route.STORED, refined)
    drawn(rig, seed=7)
    assert decision(rig, seed=7).source_depth == 0


def test_another_seed_is_another_image_with_all_the_steps_that_its_rung_skips(make_rig: MakeRig) -> None:
    rig = make_rig()
    first = drawn(rig, seed=7)
    other = decision(rig, seed=8)
    assert (other.route, other.source_id, other.skipped_steps) == (Route.SMALL_REFINE, first, 30)


@pytest.mark.parametrize(
    "parameters", [{"negative_prompt": "blur"}, {"num_inference_steps": 20}, {"guidance_scale": 2.0}, {"size": "64x64"}]
)
def test_what_was_drawn_with_other_parameters_is_no_repeat(make_rig: MakeRig, parameters: dict[str, Any]) -> None:
    rig = make_rig()
    own = drawn(rig, seed=7, **parameters)
    assert decision(rig, seed=7).route is not Route.STORED
    assert decision(rig, seed=7, **parameters).source_id == own
    assert decision(rig, seed=7, **parameters).route is Route.STORED


def test_an_image_of_a_size_that_was_asked_for_is_no_source_of_the_own_size(make_rig: MakeRig) -> None:
    rig = make_rig()
    drawn(rig, size="128x64")
    own = rig.submit(FIRST)
    assert rig.draw(LARGE) == own
    for _ in range(FEW):
        drawn(rig, size="128x64")
    assert decision(rig).source_id == own
    assert decision(rig, size="128x64").source_id != own


def test_the_seed_is_found_behind_many_variations(make_rig: MakeRig) -> None:
    rig = make_rig()
    ids = [drawn(rig, seed=seed) for seed in range(2 * FEW + 1)]
    for seed, stored in enumerate(ids):
        assert decision(rig, seed=seed).source_id == stored


def test_variations_spread_over_all_sources_of_the_best_rung_also_after_a_restart(make_rig: MakeRig) -> None:
    rig = make_rig()
    sources = {drawn(rig, seed=seed) for seed in range(3)}
    weaker = drawn(rig, SECOND)
    rig.service.parts.cache.close()
    uses: list[str | None] = []
    for _ in range(3):
        rig = make_rig()
        found = [decision(rig) for _ in range(2)]
        rig.service.parts.cache.close()
        assert found[0].source_id != found[1].source_id
        assert all(one.skipped_steps == rig.service.settings.routing.repeat_max_k for one in found)
        uses += [one.source_id for one in found]
    assert Counter(uses) == dict.fromkeys(sources, 2)
    assert weaker not in uses


def test_fewer_steps_bound_k_by_the_same_share(make_rig: MakeRig) -> None:
    rig = make_rig()
    drawn(rig)
    assert decision(rig, num_inference_steps=10).skipped_steps == 5
    assert decision(rig, num_inference_steps=10, seed=3).skipped_steps == 6
