"""open_clip behind the Embedder interface. Imported only by processes that embed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modm_tasks.errors import ConfigError, UnavailableError
from vector_store.embedder import Vector, bundled_folder, is_bundled, split_name, unit_rows

if TYPE_CHECKING:
    from PIL import Image

TEXT_BATCH, IMAGE_BATCH = 128, 32


class ClipEmbedder:
    """Any open_clip model and checkpoint, fp32: the ladders belong to fp32 cosines.

    Reference: CLIP ViT-L/14 of OpenAI on the raw prompt (paper section 5.1). Those weights were trained with QuickGELU,
    and the same network with plain GELU gives other cosines without any error, so the checkpoint's own flag decides.
    """

    def __init__(
        self, name: str, identity: str, device: str = "cpu", *, loaded: tuple[Any, Any, Any] | None = None
    ) -> None:
        """``loaded`` is (model, preprocess, tokenizer) in the place of what ``name`` would load."""
        import torch

        self.identity = identity
        self._torch, self._device = torch, torch.device(device)
        model, self._preprocess, self._tokenizer = loaded or _load(name)
        self._model = model.to(self._device).eval()
        self.dim = int(self.embed_texts(["a"]).shape[1])

    def embed_texts(self, texts: Sequence[str]) -> Vector:
        return self._rows(texts, TEXT_BATCH, lambda part: self._model.encode_text(self._tokens(part)))

    def embed_images(self, images: Sequence[Image.Image]) -> Vector:
        return self._rows(images, IMAGE_BATCH, lambda part: self._model.encode_image(self._pixels(part)))

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(list(texts)).to(self._device)

    def _pixels(self, images: Sequence[Image.Image]) -> Any:
        return self._torch.stack([self._preprocess(image.convert("RGB")) for image in images]).to(self._device)

    def _rows(self, items: Sequence[Any], batch: int, encode: Callable[[Sequence[Any]], Any]) -> Vector:
        parts: list[Vector] = []
        with self._torch.inference_mode():
            for start in range(0, len(items), batch):
                parts.append(encode(items[start : start + batch]).float().cpu().numpy())
        if not parts:
            return np.zeros((0, self.dim), dtype=np.float32)
        return unit_rows(np.concatenate(parts))


def _load(name: str) -> tuple[Any, Any, Any]:
    """(model, preprocess, tokenizer)."""
    import open_clip

    quick_gelu = False
    if is_bundled(name):
        folder = bundled_folder(name)
        open_clip.add_model_config(folder / f"{name}.json")
        model_name, pretrained = name, str(folder / f"{name}.safetensors")
    else:
        model_name, pretrained = split_name(name)
        if pretrained:
            config = open_clip.get_pretrained_cfg(model_name, pretrained)
            if not config:
                known = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none: no such model"
                raise ConfigError(f"embedder {name!r}: checkpoints of {model_name}: {known}", field="embedder")
            quick_gelu = bool(config.get("quick_gelu"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other, at load only
            model, preprocess = open_clip.create_model_from_pretrained(
                model_name, pretrained or None, precision="fp32", device="cpu", force_quick_gelu=quick_gelu
            )
            return model, preprocess, open_clip.get_tokenizer(model_name)
    except (OSError, RuntimeError, ValueError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise UnavailableError(f"embedder {name!r}: cannot load it: {line}", field="embedder") from error
