"""The shipped weights: they load plainly, draw what was asked, and are what the model card was written about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

from ops.scenes.captions import caption
from ops.scenes.card import CARD_JSON, CARD_MD, bars, markdown
from ops.scenes.classifier import attribute_accuracy
from ops.scenes.export import CLIP_FOLDER, DIFFUSION_FOLDER, LARGE, SMALL, weight_files
from ops.scenes.render import render
from ops.scenes.scene import sample_scenes

MIB = 1024 * 1024


@pytest.mark.parametrize("name", [LARGE, SMALL])
def test_a_folder_loads_plainly_and_draws_and_refines(name: str) -> None:
    torch.set_num_threads(1)
    settings = json.loads((DIFFUSION_FOLDER / name / "modm.json").read_text())
    assert settings["name"] == name
    scenes = sample_scenes(17, 4)
    rng = np.random.default_rng(1)
    call = {
        "prompt": [caption(s, rng) for s in scenes],
        "num_inference_steps": 20,
        "guidance_scale": settings["guidance_scale"],
        "max_sequence_length": settings["max_sequence_length"],
    }
    text = AutoPipelineForText2Image.from_pretrained(str(DIFFUSION_FOLDER / name)).to(torch.float32)
    text.set_progress_bar_config(disable=True)
    drawn = text(**call, height=64, width=64, generator=torch.Generator().manual_seed(0)).images
    assert drawn[0].size == (64, 64)
    assert attribute_accuracy(drawn, scenes)["mean"].mean() > 0.8
    image = AutoPipelineForImage2Image.from_pipe(text)
    image.set_progress_bar_config(disable=True)
    sources = [render(s, 3) for s in scenes]
    refined = image(**call, image=sources, strength=0.5, generator=torch.Generator().manual_seed(0)).images
    assert attribute_accuracy(refined, scenes)["mean"].mean() > 0.85


def test_the_judge_reads_rendered_scenes_and_shape_of_its_answer() -> None:
    scenes = sample_scenes(5, 100, allow_held_out=True)
    accuracy = attribute_accuracy([render(s, i) for i, s in enumerate(scenes)], scenes)
    assert set(accuracy) == {"background", "texture", "layout", "shape", "colour", "size", "mean"}
    assert all(values.shape == (100,) for values in accuracy.values())
    assert accuracy["mean"].mean() > 0.99
    wrong = attribute_accuracy([render(s, 0) for s in scenes], scenes[::-1])
    assert wrong["mean"].mean() < 0.6
    with pytest.raises(ValueError, match="1 images for 2 scenes"):
        attribute_accuracy([render(scenes[0])], scenes[:2])


def test_the_clip_loads_by_open_clip_alone_and_finds_the_picture() -> None:
    torch.set_num_threads(1)
    open_clip.add_model_config(CLIP_FOLDER / "scenes-clip.json")
    model, _, preprocess = open_clip.create_model_and_transforms(
        "scenes-clip", pretrained=str(CLIP_FOLDER / "scenes-clip.safetensors")
    )
    model.eval()
    scenes = sample_scenes(23, 60)
    rng = np.random.default_rng(2)
    tokens = open_clip.get_tokenizer("scenes-clip")([*(caption(s, rng) for s in scenes), "une licorne à la plage"])
    with torch.no_grad():
        texts = model.encode_text(tokens, normalize=True)
        images = model.encode_image(torch.stack([preprocess(render(s, 1)) for s in scenes]), normalize=True)
    assert torch.isfinite(texts).all()
    found = (texts[:-1] @ images.T).argmax(1)
    assert (found == torch.arange(60)).float().mean() > 0.9


def test_weights_are_small() -> None:
    sizes = {path: int(str(row["bytes"])) for path, row in weight_files().items()}
    assert sum(sizes.values()) <= 60 * MIB
    assert max(sizes.values()) < 15 * MIB
    assert {Path(p).parts[2] for p in sizes if p.startswith("workers")} == {LARGE, SMALL}


def test_card_and_files_agree() -> None:
    card = json.loads(CARD_JSON.read_text())
    assert card["weights"] == weight_files()
    assert card["ladder"] == json.loads((CLIP_FOLDER / "ladder.json").read_text())["rungs"]
    assert card["bars"] == bars(card)
    assert CARD_MD.read_text() == markdown(card, card["bars"])
    assert card["drawing"][LARGE]["mean"]["n"] >= 500
