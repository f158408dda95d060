"""From what Redis holds to one frozen ClusterSnapshot. ``read`` does the I/O, ``snapshot_of`` is pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modm_tasks.ledger import Ledger
from modm_tasks.messages import RequestRecord, Route, WorkerStatus
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE
from modm_tasks.redis_client import guarded
from modm_tasks.settings import Settings
from orchestrator.controller import roles
from orchestrator.controller.prices import devices, faster_small_s, mean_speed, model_step_s, profiled, worker_speeds
from orchestrator.controller.rules import Rules
from orchestrator.decisions.forecast import forecast_per_min
from orchestrator.decisions.snapshot import ClusterSnapshot, WorkerSpeed

#: So many waiting requests of a queue are looked at one by one; the rest count as the average of these.
SAMPLE = 300


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """One request of a ready set: steps it will run, and when its user began to wait (Unix s)."""

    steps: int
    arrival_s: float


@dataclass(frozen=True, kw_only=True)
class Readings:
    """Raw facts of one moment. ``waiting`` holds the first SAMPLE of each queue, ``queued`` how many there are."""

    now_s: float
    series: Sequence[Mapping[str, float]] = ()
    queued: Mapping[str, int] = field(default_factory=dict)
    waiting: Mapping[str, Sequence[Waiting]] = field(default_factory=dict)
    running: Sequence[RequestRecord] = ()
    step_s: Mapping[str, float] = field(default_factory=dict)
    device_step_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    prior_step_s: Mapping[str, float] = field(default_factory=dict)
    ready: Sequence[WorkerStatus] = ()
    since_s: Mapping[str, float] = field(default_factory=dict)


def read(ledger: Ledger, settings: Settings, rules: Rules, ready: Sequence[WorkerStatus]) -> Readings:
    """Everything that a snapshot needs: about ten round trips, whatever the size of the backlog."""
    now_s = ledger.now_s()
    counts = ledger.counts()
    return Readings(
        now_s=now_s,
        series=ledger.series(window_s=settings.controller.window_s, bucket_s=rules.bucket_s, now_s=now_s),
        queued={queue: counts[f"ready:{queue}"] for queue in (LARGE_GEN, SMALL_REFINE)},
        waiting={queue: _waiting(ledger, queue, settings.num_inference_steps) for queue in (LARGE_GEN, SMALL_REFINE)},
        running=ledger.get_many(ledger.index("running", limit=10_000)),
        step_s=ledger.step_s(),
        device_step_s=ledger.device_step_s(),
        prior_step_s=profiled(settings),
        ready=tuple(ready),
        since_s={name: state.at_s for name, state in roles.applied(ledger).items()},
    )


@guarded
def _waiting(ledger: Ledger, queue: str, total_steps: int) -> list[Waiting]:
    pipe = ledger.redis.pipeline(transaction=False)
    for request_id, _rank in ledger.ready(queue, limit=SAMPLE):
        pipe.hmget(f"{ledger.prefix}req:{request_id}", "request", "decision", "arrival_s")
    found = []
    for request, decision, arrival in pipe.execute():
        if request:  # it may have ended since the list was read
            asked = json.loads(request).get("num_inference_steps") or total_steps
            skipped = json.loads(decision).get("skipped_steps", 0) if decision else 0
            found.append(Waiting(steps=steps_to_run(asked, skipped, total_steps), arrival_s=float(arrival or 0)))
    return found


def steps_to_run(asked: int, skipped: int, total_steps: int) -> int:
    """A hit runs what is left after k of T steps, in proportion where the user asked for another number of steps."""
    return max(1, round(asked * (1 - skipped / total_steps)))


def snapshot_of(
    readings: Readings, rules: Rules, settings: Settings, *, members: Sequence[str], n_large: int
) -> ClusterSnapshot:
    """The snapshot for ``members``, in the order in which they become large, of which ``n_large`` are large now."""
    total = settings.num_inference_steps
    own = worker_speeds(readings, settings)
    known = tuple(own[name] for name in members if name in own)
    large_s, small_s = mean_speed(known) if known else (x * total for x in model_step_s(readings, settings))
    large_step_s, small_step_s = large_s / total, small_s / total
    window = _sum(readings.series)
    hits, misses = window.get("hits", 0.0), max(0.0, window.get("misses", 0.0))
    rate = arrivals_per_min(readings.series, rules.bucket_s, readings.now_s)
    queues = {queue: readings.queued.get(queue, 0) for queue in (LARGE_GEN, SMALL_REFINE)}
    here = set(members)
    return ClusterSnapshot(
        now_s=readings.now_s,
        n_workers=len(members),
        n_large=n_large,
        large_s=large_s,
        small_s=small_s,
        total_steps=total,
        arrivals_per_min=rate,
        forecast_per_min=forecast(readings.series, rules, readings.now_s) if rules.forecasts else None,
        hit_rate=hits / (hits + misses) if hits + misses > 0 else 0.0,
        k_histogram=k_histogram(window),
        backlog_large=queues[LARGE_GEN],
        backlog_small=queues[SMALL_REFINE],
        backlog_large_s=_work_s(readings, LARGE_GEN, large_step_s),
        backlog_small_s=_work_s(readings, SMALL_REFINE, small_step_s),
        running_s=tuple(sorted(ends_in_s(readings, settings, large_step_s, small_step_s, own).values())),
        slo_s=_ratio(window, "deadline_sum", window.get("deadlines", 0.0))
        or settings.slo.multiple * (settings.slo.large_latency_s or large_s),
        oldest_large_s=_oldest_s(readings, LARGE_GEN),
        oldest_small_s=_oldest_s(readings, SMALL_REFINE),
        latency_s=_ratio(window, "latency_sum", window.get("done", 0.0) + window.get("failed", 0.0)),
        late_share=_ratio(window, "slo_missed", window.get("slo_total", 0.0)),
        since_move_s={w: max(0.0, readings.now_s - at) for w, at in readings.since_s.items() if w in here},
        min_dwell_s=settings.controller.min_dwell_s,
        switch_s=switch_s(readings.ready),
        period_s=rules.period_s,
        pooled=rules.mode == "pooled",
        static_large=rules.static_large,
        degrade=settings.slo.degrade,
        floor_threshold_rungs=settings.slo.floor_threshold_rungs,
        floor_steps=settings.slo.floor_steps,
        faster_small_s=faster_small_s(readings, settings),
        speeds=known if len(known) == len(members) else (),
    )


def arrivals_per_min(series: Sequence[Mapping[str, float]], bucket_s: float, now_s: float) -> float:
    """Arrivals that make work, per minute, over the part of the window in which the system has had any.

    Stored answers make no work. The window counts from its first arrival, so a system that has just been started does not
    take the silence before for a low load.
    """
    counts = [(row["at_s"], _work(row)) for row in series]
    first = next((at for at, n in counts if n > 0), None)
    if first is None:
        return 0.0
    seconds = max(bucket_s, now_s - first)
    return 60 * sum(n for _, n in counts) / seconds


def forecast(series: Sequence[Mapping[str, float]], rules: Rules, now_s: float) -> float | None:
    """Load half a period ahead, from the whole buckets since the first arrival. None with fewer than four of them."""
    whole = [(row["at_s"], _work(row)) for row in series if row["at_s"] + rules.bucket_s <= now_s]
    while whole and whole[0][1] <= 0:
        whole.pop(0)
    if len(whole) < 4:
        return None
    middle_s = whole[-1][0] + rules.bucket_s / 2
    counts = [n for _, n in whole]
    return forecast_per_min(counts, bucket_s=rules.bucket_s, ahead_s=now_s + rules.period_s / 2 - middle_s)


def k_histogram(window: Mapping[str, float]) -> dict[int, float]:
    """Hits by skipped steps."""
    found = {int(name[2:]): n for name, n in window.items() if name.startswith("k:") and n > 0}
    return dict(sorted(found.items()))


def ends_in_s(
    readings: Readings,
    settings: Settings,
    large_step_s: float,
    small_step_s: float,
    own: Mapping[str, WorkerSpeed] | None = None,
) -> dict[str, float]:
    """Predicted seconds until each busy worker is free; hits at the small model's speed; each at its ``own``."""
    total = settings.num_inference_steps
    left = {}
    for record in readings.running:
        decision = record.decision
        hit = decision is not None and decision.route is Route.SMALL_REFINE
        skipped = decision.skipped_steps if decision is not None and hit else 0
        steps = steps_to_run(record.request.num_inference_steps or total, skipped, total)
        speed = (own or {}).get(record.worker or "")
        step_s = small_step_s if hit else large_step_s
        if speed is not None:
            step_s = (speed.small_s if hit else speed.large_s) / total
        left[record.worker or record.id] = max(0, steps - record.step) * step_s
    return left


def switch_s(ready: Sequence[WorkerStatus]) -> float:
    """The dearest model load that a role change may cost: 0 where both models are resident."""
    prices = [
        price
        for w in ready
        for model, price in w.swap_s.items()
        if not {w.large_model, w.small_model} <= set(w.models) and model in {w.large_model, w.small_model}
    ]
    return max(prices, default=0.0)


def _work(row: Mapping[str, float]) -> float:
    return max(0.0, row.get("arrivals", 0.0) - row.get("stored", 0.0))


def _work_s(readings: Readings, queue: str, step_s: float) -> float:
    sample = readings.waiting.get(queue, ())
    if not sample:
        return 0.0
    return readings.queued.get(queue, 0) * step_s * sum(w.steps for w in sample) / len(sample)


def _oldest_s(readings: Readings, queue: str) -> float:
    return max((readings.now_s - w.arrival_s for w in readings.waiting.get(queue, ())), default=0.0)


def _ratio(window: Mapping[str, float], name: str, of: float) -> float | None:
    return window.get(name, 0.0) / of if of > 0 else None


def _sum(series: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in series:
        for name, value in row.items():
            if name != "at_s":
                total[name] = total.get(name, 0.0) + value
    return total


def inputs(snapshot: ClusterSnapshot) -> dict[str, Any]:
    """The snapshot as `explain` shows it: rounded, with the derived figures of equations 7 and 8."""
    rows = snapshot.to_json() | {
        "refine_share": snapshot.refine_share,
        "miss_per_min": snapshot.miss_per_min,
        "hit_work_per_min": snapshot.hit_work_per_min,
    }
    rows["speeds"] = devices(snapshot.speeds)
    return {name: plain(value) for name, value in rows.items()}


def plain(value: Any) -> Any:
    """For JSON and people: four digits, text keys, no infinities."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
