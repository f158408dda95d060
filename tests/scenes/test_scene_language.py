"""Scenes, their pictures and their captions: pure functions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ops.scenes.captions import caption, captions, parse_caption, vocabulary
from ops.scenes.render import SIZE, render, render_array
from ops.scenes.scene import (
    ATTRIBUTES,
    Scene,
    SceneObject,
    edit_scene,
    sample_scene,
    sample_scenes,
    scene_from_codes,
    swap_colours,
    swap_positions,
)

CHECKSUM = "366127656c6b"


def test_the_same_seed_draws_the_same_picture() -> None:
    scene = sample_scenes(3, 1)[0]
    assert render(scene, 5).size == (SIZE, SIZE)
    assert np.array_equal(render_array(scene, 5), render_array(scene, 5))
    assert not np.array_equal(render_array(scene, 5), render_array(scene, 6))


def test_pictures_do_not_change_between_machines_and_sessions() -> None:
    # Flat colours and a fixed jitter: a checksum of coarse colours, which anti-aliasing does not reach.
    scene = Scene((SceneObject("square", "red", "large"),), "centre", "white", "striped")
    coarse = render_array(scene, 1)[4::8, 4::8] // 32
    assert hashlib.sha256(coarse.tobytes()).hexdigest()[:12] == CHECKSUM


def test_every_scene_is_told_and_read_back_in_every_phrasing() -> None:
    for scene in sample_scenes(4, 300, allow_held_out=True):
        for text in captions(scene, 1, 6):
            assert parse_caption(text) == scene
            assert len(text.replace(",", " ,").split()) <= 22
            assert set(text.replace(",", " ,").split()) <= set(vocabulary())


@pytest.mark.parametrize("text", ["", "a cat", "a big red circle", "a big red circle on a plain white background"])
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a scenes caption"):
        parse_caption(text)


def test_held_out_combinations_are_really_held_out() -> None:
    rng = np.random.default_rng(8)
    assert not any(sample_scene(rng).held_out for _ in range(3000))
    free = [sample_scene(rng, allow_held_out=True) for _ in range(1000)]
    assert any(s.held_out for s in free)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_edit_changes_one_attribute(attribute: str) -> None:
    rng = np.random.default_rng(2)
    for scene in sample_scenes(6, 50, allow_held_out=True):
        edited = edit_scene(scene, rng, attribute=attribute)
        assert sum(a != b for a, b in zip(scene.codes(), edited.codes(), strict=True)) == 1


def test_swaps_change_what_they_say() -> None:
    a, b = SceneObject("circle", "red", "large"), SceneObject("star", "blue", "small")
    scene = Scene((a, b), "left-right", "white", "plain")
    assert swap_positions(scene).objects == (b, a)
    assert [o.colour for o in swap_colours(scene).objects] == ["blue", "red"]
    assert [o.shape for o in swap_colours(scene).objects] == ["circle", "star"]
    single = Scene((a,), "left", "white", "plain")
    assert swap_positions(single).layout == "right"
    assert swap_colours(single) == single


def test_codes_say_everything() -> None:
    for scene in sample_scenes(9, 200, allow_held_out=True):
        assert scene_from_codes(scene.codes()) == scene


def test_impossible_scenes_are_refused() -> None:
    circle = SceneObject("circle", "red", "large")
    with pytest.raises(ValueError, match="layout"):
        Scene((circle,), "left-right", "white", "plain")
    with pytest.raises(ValueError, match="different colours"):
        Scene((circle, circle), "left-right", "white", "plain")
    with pytest.raises(ValueError, match="no such object"):
        SceneObject("blob", "red", "large")
    with pytest.raises(ValueError, match="no such background"):
        Scene((circle,), "left", "white", "furry")


def test_phrasings_vary() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scenes(5, 1)[0]
    assert len({caption(scene, rng) for _ in range(50)}) > 15
