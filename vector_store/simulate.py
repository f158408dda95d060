"""Replay a trace through the eviction policies at several sizes: the study of the reference's ``cache_policy`` folder.

Each prompt looks for the nearest image in the cache; a ladder says whether that is a hit and how many steps it saves.
A prompt's own vector stands for its image, so similarities are text-to-text: the order of the policies carries over
to real images, the hit rates do not. Eviction is production's own function, in production's batches of capacity/100.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from modm_tasks.errors import InvalidInputError, NotFoundError, TraceError
from vector_store.embedder import Vector, unit_rows
from vector_store.eviction import Held, Policy, choose

SimPolicy = Literal["fifo", "lru", "utility", "static"]
POLICIES: tuple[SimPolicy, ...] = ("fifo", "lru", "utility", "static")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to replay. ``ladder`` is (cosine, k), best first; ``static`` fills up and never changes again."""

    sizes: tuple[int, ...]
    policies: tuple[SimPolicy, ...]
    insert: Literal["all", "miss"]
    ladder: tuple[tuple[float, int], ...]
    window: int = 200
    steps: int = 50


@dataclass(kw_only=True)
class Result:
    """One policy at one size. ``gaps`` are requests between a source and its hit; ``reuse`` counts uses per image."""

    policy: SimPolicy
    size: int
    steps: int
    hits: list[bool] = field(default_factory=list)
    ks: list[int] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    reuse: Counter[int] = field(default_factory=Counter)
    window: int = 200

    def hit_rate_over_time(self) -> list[float]:
        """One value per window of requests; a last part of a window is left out unless it is all there is."""
        full = len(self.hits) // self.window or 1
        return [float(np.mean(self.hits[i * self.window : (i + 1) * self.window] or [False])) for i in range(full)]

    def summary(self) -> dict[str, Any]:
        """The figures of a table's row. ``saved_share`` is the part of all denoising steps that hits skip."""
        requests, used = len(self.hits), len(self.reuse)
        gaps = self.gaps or [0]
        return {
            "policy": self.policy,
            "size": self.size,
            "requests": requests,
            "hit_rate": sum(self.hits) / max(1, requests),
            "mean_k": float(np.mean(self.ks)) if self.ks else 0.0,
            "saved_share": sum(self.ks) / max(1, requests * self.steps),
            "gap_p50": float(np.percentile(gaps, 50)),
            "gap_p90": float(np.percentile(gaps, 90)),
            "reused_share": used / max(1, requests),
            "reuse_max": max(self.reuse.values(), default=0),
        }


def make_plan(*, sizes: str, policies: str, insert: str, ladder: str, window: int = 200) -> Plan:
    """From the command line's texts. Raises InvalidInputError that names the option."""
    try:
        found = tuple(sorted({int(s) for s in sizes.split(",")}))
    except ValueError:
        raise InvalidInputError(f"sizes {sizes[:60]!r} is not whole numbers with commas", field="sizes") from None
    if not found or found[0] < 1:
        raise InvalidInputError("each size must be 1 or more", field="sizes")
    names = tuple(dict.fromkeys(p.strip() for p in policies.split(",")))
    if unknown := [p for p in names if p not in POLICIES]:
        raise InvalidInputError(f"policy {unknown[0]!r} is none of {', '.join(POLICIES)}", field="policies")
    if insert not in ("all", "miss"):
        raise InvalidInputError(f"insert {insert!r} is neither all nor miss", field="insert")
    return Plan(
        sizes=found,
        policies=cast("tuple[SimPolicy, ...]", names),
        insert=cast("Literal['all', 'miss']", insert),
        ladder=parse_ladder(ladder),
        window=window,
    )


def parse_ladder(text: str) -> tuple[tuple[float, int], ...]:
    """``0.95:30,0.90:25`` to rungs, best first. Raises InvalidInputError."""
    try:
        rungs = [(float(a), int(b)) for a, b in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise InvalidInputError(f"ladder {text[:60]!r} is not cosine:k with commas", field="ladder") from None
    if any(not 0 <= s <= 1 or not 0 < k < 50 for s, k in rungs):
        raise InvalidInputError("ladder: cosines are 0 to 1 and k is 1 to 49", field="ladder")
    return tuple(sorted(rungs, reverse=True))


def load_vectors(trace: Path | None, embeddings: Path | None, embedder: str = "") -> Vector:
    """float32 [n, dim], unit rows, from a .npy file or by embedding a trace. Raises InvalidInputError, TraceError."""
    if (trace is None) == (embeddings is None):
        raise InvalidInputError("give a trace or --embeddings", field="trace")
    if embeddings is not None:
        try:
            matrix = np.load(embeddings, allow_pickle=False)
        except FileNotFoundError:
            raise NotFoundError(f"no file {embeddings}", field="embeddings") from None
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{embeddings} is not a .npy array: {error}", field="embeddings") from error
        if matrix.ndim != 2 or not len(matrix) or matrix.dtype.kind != "f" or not np.isfinite(matrix).all():
            raise InvalidInputError(f"{embeddings} is not [n, dim] of finite numbers", field="embeddings")
        return unit_rows(matrix)
    from modm_tasks.settings import load_settings
    from vector_store.embedder import load_embedder

    assert trace is not None
    prompts = read_prompts(trace)
    return load_embedder(embedder or load_settings().embedder).embed_texts(prompts)


def read_prompts(trace: Path) -> list[str]:
    """Prompts in order: JSONL with ``prompt``, or plain text, one a line. Raises TraceError with file and row."""
    try:
        lines = trace.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NotFoundError(f"no file {trace}", field="trace") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"not readable text: {error}", file=str(trace)) from error
    prompts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if trace.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            raise TraceError("missing", file=str(trace), row=number, field="prompt") from None
        if not isinstance(prompt, str):
            raise TraceError("not text", file=str(trace), row=number, field="prompt")
        prompts.append(prompt)
    if not prompts:
        raise TraceError("holds no prompt", file=str(trace))
    return prompts


def run(vectors: Vector, plan: Plan) -> Iterator[Result]:
    """One result per policy and size, in that order."""
    for policy in plan.policies:
        for size in plan.sizes:
            yield replay(vectors, policy, size, plan)


def replay(vectors: Vector, policy: SimPolicy, size: int, plan: Plan) -> Result:
    """One pass over the trace. One exact search per request: n * size * dim multiplications in all."""
    result = Result(policy=policy, size=size, steps=plan.steps, window=plan.window)
    batch = max(1, size // 100)
    rows = np.zeros((size + batch, vectors.shape[1]), dtype=np.float32)
    held: list[Held] = []
    since = 0
    for now, vector in enumerate(vectors):
        k = 0
        if held:
            scores = rows[: len(held)] @ vector
            best = int(np.argmax(scores))
            k = next((k for s, k in plan.ladder if scores[best] >= s), 0)
        if k:
            source = held[best]
            result.gaps.append(now - source.seq)
            result.reuse[source.seq] += 1
            held[best] = Held(
                id=source.id,
                seq=source.seq,
                created_s=source.created_s,
                last_used_s=float(now),
                utility=source.utility + k,
            )
            result.ks.append(k)
        result.hits.append(k > 0)
        if (plan.insert == "miss" and k) or (policy == "static" and len(held) >= size):
            continue
        rows[len(held)] = vector
        held.append(Held(id=str(now), seq=now, created_s=float(now)))
        since += 1
        if since >= batch and len(held) > size:
            since = 0
            gone = set(choose(held, size, cast("Policy", policy)))
            stay = [i for i, h in enumerate(held) if h.id not in gone]
            rows[: len(stay)] = rows[stay]
            held = [held[i] for i in stay]
    return result


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """CSV files and plots. Returns the paths."""
    import csv

    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {
        "summary.csv": [r.summary() for r in results],
        "hit_rate.csv": [
            {"policy": r.policy, "size": r.size, "from_request": i * r.window, "hit_rate": rate}
            for r in results
            for i, rate in enumerate(r.hit_rate_over_time())
        ],
        "gaps.csv": [{"policy": r.policy, "size": r.size, "gap": gap} for r in results for gap in r.gaps],
        "reuse.csv": [
            {"policy": r.policy, "size": r.size, "uses": uses, "images": images}
            for r in results
            for uses, images in sorted(Counter(r.reuse.values()).items())
        ],
    }
    paths: list[Path] = []
    for name, rows in tables.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else ["policy"])
            writer.writeheader()
            writer.writerows(rows)
        paths.append(folder / name)
    return [*paths, _plot(results, folder / "cache_policies.png")]


def _plot(results: Sequence[Result], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    largest = max(r.size for r in results)
    for result in results:
        label = f"{result.policy} {result.size}"
        axes[0][0].plot(
            np.arange(len(result.hit_rate_over_time())) * result.window, result.hit_rate_over_time(), label=label
        )
        if result.size == largest:
            gaps = np.sort(result.gaps or [1])
            axes[1][0].plot(gaps, np.arange(1, len(gaps) + 1) / len(gaps), label=result.policy)
            uses = Counter(result.reuse.values())
            axes[1][1].plot(sorted(uses), [uses[u] for u in sorted(uses)], marker="o", label=result.policy)
    for policy in dict.fromkeys(r.policy for r in results):
        own = [r for r in results if r.policy == policy]
        axes[0][1].plot([r.size for r in own], [r.summary()["hit_rate"] for r in own], marker="o", label=policy)
    for axis, x, y in (
        (axes[0][0], "request", "hit rate"),
        (axes[0][1], "cache size", "hit rate"),
        (axes[1][0], f"requests between source and hit, size {largest}", "share of hits"),
        (axes[1][1], f"uses of an image, size {largest}", "images"),
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(fontsize=7)
    axes[0][1].set_xscale("log")
    axes[1][0].set_xscale("log")
    axes[1][1].set_yscale("log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
