"""Text vectors of a trace: read from a file, or made by an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modm_tasks.errors import InvalidInputError

BATCH = 64


def text_vectors(
    prompts: Sequence[str], *, embeddings: Path | None, embedder: str | None, start: int = 0
) -> NDArray[np.float32] | None:
    """float32 [n, dim] of unit length; None where neither source is named. Raises InvalidInputError.

    ``embedder`` is a name that the service knows, or the folder of a text model of sentence-transformers' form.
    """
    if embeddings is not None:
        try:
            matrix = np.load(embeddings, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{embeddings}: no .npy array: {error}", field="embeddings") from error
        if matrix.ndim != 2 or len(matrix) < start + len(prompts):
            shape = "x".join(map(str, matrix.shape))
            raise InvalidInputError(
                f"{embeddings} is {shape}; {start + len(prompts)} rows are needed", field="embeddings"
            )
        return np.asarray(matrix[start : start + len(prompts)], dtype=np.float32)
    if embedder is None:
        return None
    if Path(embedder).is_dir():
        from vector_store.sentence_embedder import SentenceEmbedder

        return SentenceEmbedder(Path(embedder)).embed_texts(prompts)
    from vector_store.embedder import load_embedder

    model = load_embedder(embedder)
    parts = [model.embed_texts(list(prompts[i : i + BATCH])) for i in range(0, len(prompts), BATCH)]
    return np.concatenate(parts)
