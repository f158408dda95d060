"""Embedders: texts and images to unit vectors of one space, and the identity that keeps two spaces apart.

``scenes-clip`` is the bundled model; ``MODEL/CHECKPOINT`` names any other of open_clip (``ViT-L-14/openai`` is the
paper's); ``fake`` is the shipped test double. This module imports neither torch nor open_clip until a model is loaded,
and the identity, which names collections and files, needs neither.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from modm_tasks.errors import ConfigError, InvalidInputError

if TYPE_CHECKING:
    from PIL import Image

Vector = NDArray[np.float32]

WEIGHTS = Path(__file__).parent / "weights"


class Embedder(Protocol):
    """``identity`` is a name and a hash, safe in collection and file names: ``[a-z0-9-]`` only, no underscore."""

    identity: str
    dim: int

    def embed_texts(self, texts: Sequence[str]) -> Vector:
        """float32 [n, dim], rows of unit length. Longer texts are cut at the model's context (77 tokens for CLIP)."""
        ...

    def embed_images(self, images: Sequence[Image.Image]) -> Vector:
        """float32 [n, dim], rows of unit length."""
        ...


def embedder_identity(name: str) -> str:
    """Name and checkpoint hash, e.g. ``scenes-clip-1a2b3c4d``, without torch.

    A bundled model is hashed by content, so retrained weights never meet old vectors. A hub checkpoint is hashed by its
    name: published tags do not change. Raises ConfigError for a name that is none.
    """
    if name == "fake":
        return HashEmbedder.identity
    if is_bundled(name):
        return f"{_slug(name)}-{_content_hash(bundled_folder(name))}"
    _model, checkpoint = split_name(name)
    return f"{_slug(f'{_model}-{checkpoint}')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def is_bundled(name: str) -> bool:
    """Whether the name is of a bundled model's form; all others have a slash."""
    return re.fullmatch(r"[a-z0-9-]+", name) is not None


def bundled_folder(name: str = "scenes-clip") -> Path:
    """Folder of a bundled model. Raises ConfigError where its weights are missing."""
    folder = WEIGHTS / name
    if not (folder / f"{name}.json").is_file() or not (folder / f"{name}.safetensors").is_file():
        raise ConfigError(
            f"embedder {name!r}: no bundled weights of that name (others are written MODEL/CHECKPOINT)",
            field="embedder",
        )
    return folder


def split_name(name: str) -> tuple[str, str]:
    """``MODEL/CHECKPOINT`` to its parts; ``hf-hub:ORG/MODEL`` has no checkpoint. Raises ConfigError."""
    if re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+", name):
        return name, ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        model, _, checkpoint = name.partition("/")
        return model, checkpoint
    raise ConfigError(f"embedder {name[:80]!r} is none of scenes-clip, fake, MODEL/CHECKPOINT", field="embedder")


@lru_cache(maxsize=8)
def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for suffix in ("json", "safetensors"):
        digest.update((folder / f"{folder.name}.{suffix}").read_bytes())
    return digest.hexdigest()[:8]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48]


def load_embedder(name: str, device: str = "cpu") -> Embedder:
    """Load a model. Takes seconds (open_clip's import alone some ten on two slow cores).

    Raises ConfigError for an unknown name and UnavailableError where a checkpoint cannot be fetched.
    """
    if name == "fake":
        return HashEmbedder()
    from vector_store.clip_embedder import ClipEmbedder

    return ClipEmbedder(name, embedder_identity(name), device)


def encode_vector(vector: Vector) -> str:
    """Base64 of little-endian float32, as messages carry vectors."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()


def decode_vector(text: str, dim: int | None = None) -> Vector:
    """Back to float32 [dim]. Raises InvalidInputError: not base64, wrong length, not finite."""
    try:
        vector = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"vector is not base64 of float32: {error}", field="vector") from error
    if dim is not None and len(vector) != dim:
        raise InvalidInputError(f"vector has {len(vector)} dimensions; the embedder has {dim}", field="vector")
    if not np.isfinite(vector).all():
        raise InvalidInputError("vector has values that are not finite", field="vector")
    return vector


def unit_rows(matrix: NDArray[np.floating]) -> Vector:
    """Scale rows to length 1; a row of zeros stays."""
    rows = np.asarray(matrix, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), dtype=np.float32)


@lru_cache(maxsize=20_000)
def _word_vector(word: str) -> Vector:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(HashEmbedder.dim).astype(np.float32)


class HashEmbedder:
    """A public, deterministic test double without torch.

    A text is the sum of one fixed random vector per word, so texts that share words are similar: cosine is about the
    share of common words, with noise of some 0.12 in 64 dimensions. An image that carries its prompt
    (``image.info["modm:prompt"]``, as the fake engine's do) gets its prompt's vector, another one its 4x4x4 colour
    histogram. Not for production: it knows no meaning.
    """

    identity = "fake-hash64"
    dim = 64

    def embed_texts(self, texts: Sequence[str]) -> Vector:
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()) or [text]:
                row += _word_vector(word)
        return unit_rows(rows)

    def embed_images(self, images: Sequence[Image.Image]) -> Vector:
        rows = np.zeros((len(images), self.dim), dtype=np.float32)
        for row, image in zip(rows, images, strict=True):
            prompt = image.info.get("modm:prompt")
            row[:] = self.embed_texts([prompt])[0] if isinstance(prompt, str) and prompt else _histogram(image)
        return unit_rows(rows)


def _histogram(image: Image.Image) -> Vector:
    pixels = np.asarray(image.convert("RGB").resize((32, 32)), dtype=np.int64) // 64
    bins = pixels[..., 0] * 16 + pixels[..., 1] * 4 + pixels[..., 2]
    return np.bincount(bins.ravel(), minlength=64).astype(np.float32)
