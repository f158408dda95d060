"""This machine's times under service, from requests sent for that alone: what the simulator is validated with.

Unlike `modm profile`, whose processes only draw, the service, Redis and the workers' parents compete for the machine here,
as they do in a real run. None of the requests is part of the run that is validated.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from modm_tasks.errors import InvalidInputError
from modm_tasks.messages import RequestRecord, Route, State
from modm_tasks.output import note
from orchestrator.replay import ReplayPlan, Target, replay
from orchestrator.report.build import is_hit
from orchestrator.traces.rows import TraceRow

#: Rows for: large images, all workers busy; the policy's own mix, all workers busy; one request at a time.
LARGE_ROWS, BUSY_ROWS, ALONE_ROWS = 24, 60, 24
ROWS = LARGE_ROWS + BUSY_ROWS + ALONE_ROWS
#: How finely the spread of times is kept.
SPREAD = 20
#: The first requests of each part are not counted.
WARM_ROWS = 4


def measure(target: Target, rows: Sequence[TraceRow], *, fields: dict[str, Any], workers: int) -> dict[str, Any]:
    """A profile as `device_profiles.as_toml` takes it, without device. ``fields`` go with each request.

    Raises InvalidInputError: too few rows, or no hit among them.
    """
    if len(rows) < ROWS:
        raise InvalidInputError(f"{ROWS} rows are needed to profile the stack, not {len(rows)}", field="trace")
    parts: list[list[RequestRecord]] = []
    first = 0
    for count, users, more in (
        (LARGE_ROWS, 2 * workers, {"policy": "large-only", "features": ""}),
        (BUSY_ROWS, 2 * workers, {}),
        (ALONE_ROWS, 1, {}),
    ):
        note(f"profiling the stack: {count} requests of {users} users")
        plan = ReplayPlan(concurrency=users, fields=fields | more)
        found = replay(target, rows[first : first + count], plan).records
        done = sorted((r for r in found if r.state is State.DONE and r.completion), key=lambda r: r.claimed_s or 0.0)
        parts.append(done[WARM_ROWS:])
        first += count
    return profile_of(parts[0], [r for r in parts[1] if is_hit(r)], parts[0] + parts[1], parts[2])


def profile_of(
    large: Sequence[RequestRecord],
    hits: Sequence[RequestRecord],
    busy: Sequence[RequestRecord],
    alone: Sequence[RequestRecord],
) -> dict[str, Any]:
    """Times from finished requests: large images and hits with every worker busy, all of those, and some one at a time.

    ``alone_share``: time of a hit while the other workers are idle, over the same hit while they draw.
    """
    if len(large) < 5 or len(hits) < 5 or len(alone) < 5:
        raise InvalidInputError(
            f"too few finished requests to profile: {len(large)} large, {len(hits)} hits, {len(alone)} alone",
            field="trace",
        )
    large_s, steps = median(_gpu_s(r) for r in large), max(_steps(r) for r in large)
    step_s, fixed_s = line([(_steps(r), _gpu_s(r)) for r in hits])
    large_beside = median(_occupied_s(r) - _gpu_s(r) for r in large)
    hit_beside = median(_occupied_s(r) - _gpu_s(r) for r in hits)
    share = [_gpu_s(r) / (fixed_s + step_s * _steps(r)) for r in alone if is_hit(r)]
    share += [_gpu_s(r) / large_s for r in alone if r.decision and r.decision.route is Route.LARGE_GEN]
    beside = [_occupied_s(r) - _gpu_s(r) for r in busy]
    return {
        "steps": steps,
        "overhead_s": round(median(beside), 5),
        "gap_s": round(median(gaps(busy)), 5),
        "front_s": round(median((r.queued_s or 0.0) - r.arrival_s for r in alone), 5),
        "claim_s": round(median((r.claimed_s or 0.0) - (r.queued_s or 0.0) for r in alone), 5),
        "alone_share": round(min(1.0, median(share)), 4),
        "models": {
            large[0].completion.model: {  # type: ignore[union-attr]
                "image_s": round(large_s, 5), "step_s": round(large_s / steps, 6), "draws": len(large),
                "spread": spread([_occupied_s(r) / (large_s + large_beside) for r in large]),
            },
            hits[0].completion.model: {  # type: ignore[union-attr]
                "image_s": round(fixed_s + step_s * steps, 5), "step_s": round(step_s, 6), "draws": len(hits),
                "spread": spread([_occupied_s(r) / (fixed_s + step_s * _steps(r) + hit_beside) for r in hits]),
            },
        },
    }  # fmt: skip


def spread(ratios: Sequence[float]) -> list[float]:
    """SPREAD equally likely values of a time over its median, ascending: quantiles at the middles of as many parts."""
    at = (np.arange(SPREAD) + 0.5) / SPREAD
    return [round(float(v), 4) for v in np.quantile(ratios, at)]


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(slope, intercept), neither below 0, of a line through the median time of each number of steps."""
    steps = sorted({n for n, _ in points})
    times = [median(s for n, s in points if n == at) for at in steps]
    weights = [sum(n == at for n, _ in points) for at in steps]
    through_zero = sum(w * t for w, t in zip(weights, times, strict=True)) / sum(
        w * n for w, n in zip(weights, steps, strict=True)
    )
    if len(steps) < 2:
        return through_zero, 0.0
    slope, intercept = np.polyfit(steps, times, 1, w=np.sqrt(weights))
    return (float(slope), float(intercept)) if slope > 0 and intercept >= 0 else (through_zero, 0.0)


def gaps(records: Sequence[RequestRecord]) -> list[float]:
    """Seconds from an end to the next claim of the same worker, where the next request was queued before that end."""
    found = []
    last: dict[str, float] = {}
    for r in sorted(records, key=lambda r: r.claimed_s or 0.0):
        if r.worker is None or r.claimed_s is None or r.done_s is None:
            continue
        free_s = last.get(r.worker)
        if free_s is not None and r.queued_s is not None and r.queued_s <= free_s <= r.claimed_s:
            found.append(r.claimed_s - free_s)
        last[r.worker] = r.done_s
    return found or [0.0]


def _occupied_s(record: RequestRecord) -> float:
    """From claim to end: how long the worker had it."""
    assert record.done_s is not None
    assert record.claimed_s is not None
    return record.done_s - record.claimed_s


def _gpu_s(record: RequestRecord) -> float:
    assert record.completion is not None
    return record.completion.gpu_s


def _steps(record: RequestRecord) -> int:
    assert record.completion is not None
    return record.completion.steps_run
