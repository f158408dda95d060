"""From options to a finished run: what `modm simulate`, `modm bench --simulate` and the sweeps share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modm_tasks.errors import InvalidInputError, NotFoundError, TraceError
from orchestrator.decisions import routing
from orchestrator.decisions.ladder import PUBLISHED, Ladder, load_ladder, parse
from orchestrator.device_profiles import load_profile
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.engine import Simulation
from orchestrator.simulator.outcome import Outcome
from orchestrator.simulator.similarity import (
    Similarities,
    StatisticalSimilarities,
    VectorSimilarities,
    load_embeddings,
)
from orchestrator.traces import arrivals

#: Times of a profile that are no drawing.
BESIDE = ("overhead_s", "front_s", "claim_s", "gap_s", "alone_share")


@dataclass(frozen=True, kw_only=True)
class Load:
    """Arrivals: kind, rate, how many (0 = all rows of the source), concurrency of a closed loop, file of recorded ones."""

    kind: str = "poisson"
    rate_per_min: float = 0.0
    num_requests: int = 0
    concurrency: int = 1
    seed: int = 42
    file: Path | None = None


def choose_ladder(text: str | None, file: Path | None) -> Ladder:
    """From the command line, a file, or the paper's."""
    if text is not None and file is not None:
        raise InvalidInputError("give ladder or ladder-file, not both", field="ladder")
    if file is not None:
        return load_ladder(file)
    return PUBLISHED if text is None else parse(text)


def speeds(
    *, profile: str | None, large: str, small: str, large_s: float | None, small_s: float | None
) -> dict[str, Any]:
    """Times of a SimConfig: seconds of a full image of both models and what the profile knows beside; given ones win."""
    if profile is None and (large_s is None or small_s is None):
        raise InvalidInputError("give --large-s and --small-s, or --profile", field="large_s")
    found = load_profile(profile) if profile is not None else None
    values = []
    for name, model, given in (("large_s", large, large_s), ("small_s", small, small_s)):
        value = given if given is not None or found is None else found.image_s(model)
        if value is None or value <= 0:
            raise InvalidInputError(f"{name} must be above 0", field=name)
        values.append(value)
    times = {"large_s": values[0], "small_s": values[1]}
    if found is None:
        return times
    fixed = {
        f"{role}_fixed_s": found.fixed_s(model)
        for role, model, given in (("large", large, large_s), ("small", small, small_s))
        if given is None
    }
    spread = {
        f"{role}_spread": found.models[model].spread
        for role, model, given in (("large", large, large_s), ("small", small, small_s))
        if given is None
    }
    return times | fixed | spread | {name: getattr(found, name) for name in BESIDE}


def vectors(path: Path, *, warm: int, ladder: Ladder, lowest_rungs: int = 1) -> VectorSimilarities:
    """Similarities from a file; down to the ladder's threshold as far as degradation may lower it."""
    text, image = load_embeddings(path)
    threshold = ladder.lowered(lowest_rungs).threshold
    return VectorSimilarities(text, warm=warm, threshold=threshold, image=image)


def statistical(n: int, *, hit_rate: float, k_share: str, ladder: Ladder, seed: int) -> StatisticalSimilarities:
    """``k_share`` like ``30:.5,25:.5``: P(k) over the ladder's k; empty = all rungs alike."""
    by_k = {rung.skipped_steps: rung.min_similarity for rung in ladder.rungs}
    try:
        parts = [part.split(":") for part in k_share.split(",") if part]
        shares = [(int(k), float(w)) for k, w in parts] or [(k, 1.0) for k in by_k]
    except ValueError:
        raise InvalidInputError(f"k-share {k_share[:60]!r} must look like 30:.5,25:.5", field="k_share") from None
    if unknown := [k for k, _ in shares if k not in by_k]:
        raise InvalidInputError(f"k-share: the ladder has no rung with k={unknown[0]}", field="k_share")
    return StatisticalSimilarities(n, hit_rate=hit_rate, shares=[(by_k[k], w) for k, w in shares], seed=seed)


def arrival_times(load: Load, source: Similarities) -> list[float]:
    """As many as asked for, at most the rows that the source has after its warm ones."""
    available = source.n - source.warm
    if load.num_requests > available:
        raise InvalidInputError(
            f"num-requests must be at most {available} (rows after the warm cache), not {load.num_requests}",
            field="num_requests",
        )
    n = load.num_requests or available
    if load.kind == "closed":
        return [0.0] * n
    times: list[float] | None = None
    if load.kind == "recorded":
        if load.file is None:
            raise InvalidInputError("arrivals recorded needs --arrivals-file", field="arrivals_file")
        times = recorded_times(load.file)[:n]
        n = len(times)
    return arrivals.arrival_times(load.kind, n, recorded=times, rate_per_min=load.rate_per_min or None, seed=load.seed)


def recorded_times(path: Path) -> list[float]:
    """``arrival_s`` of each JSONL row (or one number a line), sorted. Raises TraceError, NotFoundError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"cannot read {path}: {error}") from error
    out = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "null")
            if row is not None:
                out.append(float(row["arrival_s"] if isinstance(row, dict) else row))
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError("must be a number", file=str(path), row=number, field="arrival_s") from error
    if not out:
        raise TraceError("holds no row", file=str(path))
    return sorted(out)


def simulate(config: SimConfig, source: Similarities, load: Load) -> Outcome:
    """One run. Raises InvalidInputError before anything runs."""
    check(config)
    concurrency = load.concurrency if load.kind == "closed" else 0
    return Simulation(config, source, arrival_times(load, source), concurrency=concurrency).run()


def check(config: SimConfig) -> None:
    """Names and ranges that the command line cannot check."""
    from orchestrator.decisions.allocation.registry import POLICIES

    routing.check_policy(config.policy)
    if config.allocation not in POLICIES:
        raise InvalidInputError(
            f"allocation must be one of {', '.join(POLICIES)}, not {config.allocation!r}", field="allocation"
        )
    if config.workers not in {"pooled", "roles", "pooled-roles"}:
        raise InvalidInputError(
            f"workers must be pooled, roles or pooled-roles, not {config.workers!r}", field="workers"
        )
    if config.cache_eviction not in {"fifo", "lru", "utility"}:
        raise InvalidInputError(
            f"cache-eviction must be fifo, lru or utility, not {config.cache_eviction!r}", field="cache_eviction"
        )
    if config.variant not in {"paper", "code"}:
        raise InvalidInputError(f"variant must be paper or code, not {config.variant!r}", field="variant")
    for name in ("gpus", "cache_capacity", "period_s", "wait_depth"):
        if getattr(config, name) <= 0:
            raise InvalidInputError(f"{name} must be above 0, not {getattr(config, name)}", field=name)


def choose_source(
    *,
    embeddings: Path | None,
    hit_rate: float | None,
    k_share: str,
    warm: int,
    ladder: Ladder,
    num_requests: int,
    seed: int,
) -> Similarities:
    """Vectors or statistics, exactly one of them."""
    if (embeddings is None) == (hit_rate is None):
        raise InvalidInputError("give either --embeddings or --hit-rate", field="embeddings")
    if embeddings is not None:
        return vectors(embeddings, warm=warm, ladder=ladder)
    if num_requests < 1:
        raise InvalidInputError("num-requests must be at least 1 with --hit-rate", field="num_requests")
    assert hit_rate is not None
    return statistical(num_requests, hit_rate=hit_rate, k_share=k_share, ladder=ladder, seed=seed)
