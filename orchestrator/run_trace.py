"""One measured run of a trace: import images, warm up, replay, gather roles and images, build the report."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modm_tasks.errors import InvalidInputError, ModmError
from modm_tasks.messages import RequestRecord, State
from modm_tasks.output import note
from orchestrator.replay import Listener, ReplayPlan, ReplayResult, replay, warm_up
from orchestrator.report.build import build_report, is_hit
from orchestrator.report.contact_sheet import Pair, contact_sheet
from orchestrator.report.machine import describe
from orchestrator.targets import DirectTarget, HttpTarget
from orchestrator.traces.arrivals import arrival_times
from orchestrator.traces.rows import TraceRow

log = logging.getLogger(__name__)
SHEET_PAIRS = 16

Shown = Callable[[str], AbstractContextManager[Listener]]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What to run. ``policy``, ``features`` and ``namespace`` go with each request; None leaves it to the orchestrator."""

    rows: Sequence[TraceRow]
    arrivals: str = "closed"
    concurrency: int = 1
    rate_per_min: float | None = None
    speed: float = 1.0
    seed: int = 42
    warm_up: int = 0
    policy: str | None = None
    features: str | None = None
    namespace: str = "default"
    cache: str = "auto"
    deadline_s: float | None = None
    name: str = ""
    control: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    report: dict[str, Any]
    result: ReplayResult
    sheet: bytes | None = None


def run_trace(target: HttpTarget | DirectTarget, plan: RunPlan, *, shown: Shown, sheet: bool = True) -> Run:
    """Run it. Raises ModmError where the system is not there or the plan asks for something impossible."""
    counted = plan.rows[plan.warm_up :]
    if not counted:
        raise InvalidInputError(f"all {len(plan.rows)} rows are warm-up; none is left to count", field="warm_up")
    if plan.control:
        target.set_control(**plan.control)
    before = target.status()
    fields = {"namespace": plan.namespace, "cache": plan.cache} | {
        k: v
        for k, v in (("policy", plan.policy), ("features", plan.features), ("deadline_s", plan.deadline_s))
        if v is not None
    }
    if plan.warm_up:
        with shown("warm-up") as listener:
            warmed = warm_up(target, plan.rows[: plan.warm_up], ReplayPlan(fields=fields), listener)
        if warmed.interrupted:
            raise KeyboardInterrupt
    arrivals = None
    if plan.arrivals != "closed":
        arrivals = arrival_times(
            plan.arrivals,
            len(counted),
            recorded=[r.arrival_s for r in counted],
            rate_per_min=plan.rate_per_min,
            speed=plan.speed,
            seed=plan.seed,
        )
    started_s = time.time()
    policy = plan.policy or before["policy"]
    with shown(plan.name or policy) as listener:
        replay_plan = ReplayPlan(arrivals_s=arrivals, concurrency=plan.concurrency, fields=fields)
        result = replay(target, counted, replay_plan, listener)
    moves = [m for m in target.role_moves(started_s) if m.get("old") and m.get("new")]
    report = build_report(
        result.records,
        policy=policy,
        name=plan.name,
        refused=result.refused,
        lost=result.lost,
        role_moves=moves,
        machine=describe(),
        settings=_settings(plan, before),
        interrupted=result.interrupted,
    )
    picture = _sheet(target, result.records) if sheet and not result.interrupted else None
    return Run(report=report, result=result, sheet=picture)


def _settings(plan: RunPlan, status: dict[str, Any]) -> dict[str, Any]:
    names = ("arrivals", "concurrency", "rate_per_min", "speed", "seed", "warm_up", "features", "namespace", "cache")
    return {n: getattr(plan, n) for n in names} | {
        "mode": status["mode"],
        "models": status["models"],
        "workers": len(status["workers"]),
        "requests": len(plan.rows) - plan.warm_up,
    }


def _sheet(target: HttpTarget | DirectTarget, records: Sequence[RequestRecord]) -> bytes | None:
    """Hits spread over the range of k, each with its source; at most SHEET_PAIRS."""
    done = (r for r in records if r.state is State.DONE and is_hit(r))
    hits = sorted(done, key=lambda r: r.decision.skipped_steps if r.decision else 0)
    if not hits:
        return None
    step = max(1, len(hits) // SHEET_PAIRS)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.png"
        for record in hits[::step][:SHEET_PAIRS]:
            try:
                target.image(record.id, file)
                result = file.read_bytes()
                target.image(record.id, file, source=True)
            except ModmError as error:
                log.info("not on the contact sheet: %s", error)
                continue
            decision = record.decision
            words = f"similarity {decision.similarity or 0.0:.2f}, k = {decision.skipped_steps}" if decision else ""
            pairs.append(Pair(prompt=record.request.prompt, result=result, source=file.read_bytes(), caption=words))
    return contact_sheet(pairs) if pairs else None


def save_images(target: HttpTarget | DirectTarget, records: Sequence[RequestRecord], folder: Path) -> int:
    """Copy the results to ``folder`` as <request id>.png. Returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = 0
    for record in records:
        if record.state is State.DONE:
            target.image(record.id, folder / f"{record.id}.png")
            saved += 1
    note(f"{saved} images in {folder}")
    return saved
