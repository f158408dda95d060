"""Identities, vectors on the wire, and the shipped test double."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from modm_tasks.errors import ConfigError, InvalidInputError
from vector_store.embedder import (
    HashEmbedder,
    decode_vector,
    embedder_identity,
    encode_vector,
    load_embedder,
    split_name,
)


@pytest.mark.parametrize("name", ["fake", "scenes-clip", "ViT-L-14/openai", "hf-hub:laion/CLIP-ViT-B-32"])
def test_identities_are_safe_in_names_and_have_no_underscore(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", embedder_identity(name))


def test_two_checkpoints_of_one_model_are_two_identities() -> None:
    assert embedder_identity("ViT-L-14/openai") != embedder_identity("ViT-L-14/laion2b_s32b_b82k")


@pytest.mark.parametrize("name", ["no-such-bundle", "a b/c", "../x/y", "x/", ""])
def test_a_name_that_is_none_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="embedder"):
        embedder_identity(name)


def test_a_hub_name_has_no_checkpoint() -> None:
    assert split_name("hf-hub:org/model") == ("hf-hub:org/model", "")
    assert split_name("ViT-L-14/openai") == ("ViT-L-14", "openai")


def test_the_identity_needs_no_torch() -> None:
    code = (
        "import sys; from vector_store.embedder import *; embedder_identity('scenes-clip'); load_embedder('fake');"
        "print(sorted({'torch', 'open_clip', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_vectors_survive_the_wire_bit_for_bit() -> None:
    vector = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    assert np.array_equal(decode_vector(encode_vector(vector), 64), vector)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("%%", "base64"),
        ("AAA=", "float32"),
        (encode_vector(np.zeros(3, dtype=np.float32)), "dimensions"),
        (encode_vector(np.array([np.nan, 1], dtype=np.float32)), "finite"),
    ],
)
def test_a_broken_vector_is_an_input_error(text: str, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why):
        decode_vector(text, 2)


def test_the_fake_embedder_puts_like_texts_near_and_an_image_at_its_prompt() -> None:
    embedder = load_embedder("fake")
    texts = embedder.embed_texts(["a red cat on a mat", "a red cat on a sofa", "stock market report"])
    assert texts.shape == (3, HashEmbedder.dim)
    assert texts.dtype == np.float32
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    assert texts[0] @ texts[1] > 0.7 > texts[0] @ texts[2]
    image = Image.new("RGB", (32, 32), "red")
    image.info["modm:prompt"] = "a red cat on a mat"
    assert np.allclose(embedder.embed_images([image])[0], texts[0])


def test_the_fake_embedder_tells_plain_images_by_colour() -> None:
    red, red2, blue = HashEmbedder().embed_images([Image.new("RGB", (9, 9), c) for c in ("#f00", "#f80000", "#00f")])
    assert red @ red2 > 0.99
    assert red @ blue < 0.01


def test_no_texts_give_no_rows() -> None:
    assert HashEmbedder().embed_texts([]).shape == (0, 64)
