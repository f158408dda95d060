"""What batching saves: milliseconds per prompt when prompts that arrive together are embedded as one batch.

    python -m ops.benchmarks.embed [--models scenes-clip,ViT-L-14] [--batches 1,2,4,8,16,32,64] [--repeats 5] [--out FILE]

Measures the call of `orchestrator.pipeline` (``embed_texts`` on a list of at most its BATCH prompts) in a process with
the orchestrator's threads: torch's own choice, one a core. ``scenes-clip`` is the bundled model. Any other name is an
open_clip architecture in full size with random weights: time does not depend on what the weights are, and nothing is
downloaded. Each figure is the median of the repeats, taken in turns so that a slow minute falls on every size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ops.benchmarks.document import hand_over
from ops.scenes.holdout import read_eval_prompts
from orchestrator.pipeline import BATCH
from orchestrator.report.machine import describe
from vector_store.embedder import Embedder, is_bundled, load_embedder

SIZES = (1, 2, 4, 8, 16, 32, 64)


def load(name: str) -> Embedder:
    """A bundled embedder as the service loads it, or an architecture with random weights behind the same class."""
    if is_bundled(name):
        return load_embedder(name)
    import open_clip

    from vector_store.clip_embedder import ClipEmbedder

    model = open_clip.create_model(name, pretrained=None, precision="fp32", device="cpu")
    model.visual = None  # texts only: a gigabyte less
    return ClipEmbedder(name, "random", loaded=(model, None, open_clip.get_tokenizer(name)))


def measure(embedder: Embedder, prompts: Sequence[str], sizes: Sequence[int], repeats: int) -> dict[int, list[float]]:
    """Seconds of each call by batch size; no prompt comes twice in a call, and the first calls are not counted."""
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes[:3]:
        embedder.embed_texts(prompts[:size])
    for repeat in range(repeats):
        for size in sizes:
            first = repeat * size % max(1, len(prompts) - size)
            began = time.perf_counter()
            embedder.embed_texts(prompts[first : first + size])
            seconds[size].append(time.perf_counter() - began)
    return seconds


def rows(seconds: dict[int, list[float]]) -> list[dict[str, float]]:
    """One row a size: the call and its share for each prompt, ms, and how many times faster that is than the smallest."""
    medians = {size: statistics.median(values) for size, values in seconds.items()}
    alone = medians[min(medians)] / min(medians)
    return [
        {
            "batch": size,
            "call_ms": round(1e3 * took, 3),
            "per_prompt_ms": round(1e3 * took / size, 3),
            "gain": round(alone / (took / size), 2),
        }
        for size, took in sorted(medians.items())
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON document, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.embed", description=__doc__)
    parser.add_argument("--models", default="scenes-clip,ViT-L-14")
    parser.add_argument("--batches", default=",".join(map(str, SIZES)), help=f"at most {BATCH}, the pipeline's bound")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    sizes = sorted({min(BATCH, int(n)) for n in given.batches.split(",")})
    prompts = [p.text for p in read_eval_prompts()]
    found: dict[str, Any] = {"machine": describe(), "load_average": round(os.getloadavg()[0], 1), "models": {}}
    for name in given.models.split(","):
        print(f"{name} ...", file=sys.stderr)
        embedder = load(name)
        # The bundled model's calls are so short that five of them would be noise.
        repeats = given.repeats * (20 if is_bundled(name) else 1)
        found["models"][name] = {
            "dim": embedder.dim,
            "weights": "bundled" if is_bundled(name) else "random",
            "repeats": repeats,
            "rows": rows(measure(embedder, prompts, sizes, repeats)),
        }
        found["threads"] = _threads()
    hand_over(found, given.out)


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


if __name__ == "__main__":
    main()
