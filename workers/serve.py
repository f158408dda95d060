"""One claim from start to finish.

A task message is a token: it says that a queue has work, not which. `serve_one` claims the best ready request of the
queue, draws it, and hands the result over by a compare-and-set on the attempt, so that work may be done twice but is
published once. Whatever goes wrong ends in exactly one move of the ledger.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from modm_tasks.cluster import Control
from modm_tasks.errors import (
    CancelledByUserError,
    EngineError,
    InvalidInputError,
    LeaseLostError,
    ModmError,
    OutOfMemoryError,
    SourceImageError,
    UnavailableError,
)
from modm_tasks.messages import Completion, RequestRecord, Route, State, parse_size, seed_of
from modm_tasks.queues import LARGE_GEN
from modm_tasks.settings import Settings
from workers import verify
from workers.engine import Drawn, GenerateParams, RefineParams
from workers.lease import Lease
from workers.runtime import Runtime

log = logging.getLogger(__name__)
T = TypeVar("T")

#: How long a finished image waits for Redis to come back before the work is given up (the request is then re-sent).
INSIST_S = 30.0
#: Outcome of a worker whose device does not even manage one step of its own models.
UNWELL = "unwell"
#: Ends of outcomes after which the request waits in a queue again.
TO_LARGE, AGAIN = "sent to the large model", "queued again"


def model_for(record: RequestRecord, settings: Settings, *, role: str | None, mode: str, degradation: int = 0) -> str:
    """Which model draws this request.

    A miss goes to the large model, a hit to the small one, but for a large worker under published roles, which refines
    spare hits with the large model (paper section 4.2). Pooled workers refine with the small model everywhere.

    ``degradation``: steps of quality given up. After the rungs of the hit threshold and the steps of large images comes the
    faster small model, where one is set; the order is that of `orchestrator.decisions.allocation.overload.levels`.
    """
    decision = record.decision
    if decision is None or decision.route is not Route.SMALL_REFINE:
        return settings.large_model
    refines = decision.source_uri is not None
    if refines and mode == "roles" and role == "large":
        return settings.large_model
    before = settings.slo.floor_threshold_rungs + (settings.slo.floor_steps < settings.num_inference_steps)
    faster = settings.slo.fallback_small_model if degradation > before else ""
    return faster or settings.small_model


def serve_one(runtime: Runtime, queue: str) -> dict[str, Any]:
    """Serve the best ready request of ``queue``. Returns what happened, for logs and Flower; never raises ModmError."""
    settings = runtime.settings
    if runtime.unwell is not None:
        runtime.set_unwell(_ill(runtime))
        if runtime.unwell is not None:
            return {"served": None, "outcome": UNWELL, "reason": runtime.unwell}
    record = runtime.ledger.claim(queue, runtime.worker, lease_s=settings.worker.lease_s)
    if record is None:
        return {"served": None, "outcome": "nothing to do"}
    runtime.set_busy(record.id)
    written: list[str] = []
    began = time.perf_counter()
    try:
        with Lease(
            runtime.ledger,
            record.id,
            record.attempt,
            lease_s=settings.worker.lease_s,
            limit_s=0.9 * settings.worker.task_time_limit_s,  # before Celery kills the child, and its models
        ) as lease:
            outcome = _attempt(runtime, record, lease, written)
    except ModmError as error:
        outcome = _ended(runtime, record, error, written)
    except (SystemExit, KeyboardInterrupt):
        _drop(runtime, written)
        with contextlib.suppress(ModmError):
            runtime.ledger.give_back(record.id, record.attempt)
        raise
    except Exception as error:
        # A time limit or a bug: the ledger learns of it before the error takes its course.
        _drop(runtime, written)
        with contextlib.suppress(ModmError):
            runtime.ledger.fail(record.id, record.attempt, f"{type(error).__name__}: {error}", retry=True)
        raise
    finally:
        runtime.set_busy(None)
    out = {"served": record.id, "attempt": record.attempt, "outcome": outcome, "s": time.perf_counter() - began}
    if (waits_in := _waits_in(outcome, queue)) is not None:
        out["waits_in"] = waits_in
    log.info("%s %s", queue, outcome, extra={"request_id": record.id, "worker": runtime.worker, "route": queue})
    return out


def _waits_in(outcome: str, queue: str) -> str | None:
    """The queue that has the request again, and so needs a token; None when it has ended."""
    if outcome.endswith(TO_LARGE):
        return LARGE_GEN
    return queue if outcome.endswith(AGAIN) else None


def _attempt(runtime: Runtime, record: RequestRecord, lease: Lease, written: list[str]) -> str:
    from vector_store.embedder import encode_vector

    ledger, control = runtime.ledger, runtime.control()
    drawn = _draw_with_room(runtime, record, control, lease)
    if drawn.load_s > 0:
        runtime.say_soon()
    lease.check()
    if (
        runtime.safety_hook is not None
        and (refused := runtime.safety_hook(record.request.prompt, drawn.image)) is not None
    ):
        raise InvalidInputError(f"image refused: {refused}")
    vector = runtime.embedder.embed_images([drawn.image])[0]
    floor, score = verify.verify_floor(record, control), None
    if floor is not None:
        score = verify.score(runtime, record, vector)
    uri, n_bytes = runtime.store.write(record.id, record.attempt, drawn.image)
    written.append(uri)
    completion = _completion(runtime, record, drawn, uri, n_bytes, encode_vector(vector), score)
    if floor is not None and score is not None and score < floor and verify.may_escalate(runtime, record, score, floor):
        reason, was = verify.reason(record, score, floor), record.decision
        move = partial(ledger.reroute_to_large, record.id, record.attempt, reason, fallback=completion, was=was)
        if _insist(move) is State.CANCELLED:
            _drop(runtime, written)
            return State.CANCELLED
        return f"verification failed, {TO_LARGE}"
    _insist(lambda: ledger.finish(record.id, record.attempt, completion, device=runtime.device_name))
    verify.drop_fallback(runtime, record)
    return "done"


def _completion(
    runtime: Runtime, record: RequestRecord, drawn: Drawn, uri: str, n_bytes: int, vector: str, score: float | None
) -> Completion:
    decision = record.decision
    refined = decision is not None and decision.source_uri is not None
    fallback = None
    if decision is not None and decision.policy == "reroute":
        fallback = runtime.ledger.field(record.id, "fallback")
    return Completion(
        uri=uri,
        width=drawn.image.width,
        height=drawn.image.height,
        seed=seed_of(record.id, record.request.seed),
        model=drawn.model,
        steps_run=drawn.steps_run,
        skipped_steps=decision.skipped_steps if decision is not None and refined else 0,
        depth=decision.source_depth + 1 if decision is not None and refined else 0,
        gpu_s=drawn.gpu_s,
        load_s=drawn.load_s,
        vector=vector,
        embedder=runtime.embedder.identity,
        bytes=n_bytes,
        escalated=fallback is not None,
        clip_score=score,
        first_clip_score=Completion.model_validate_json(fallback).clip_score if fallback else None,
    )


def _draw_with_room(runtime: Runtime, record: RequestRecord, control: Control, lease: Lease) -> Drawn:
    """Draw; out of memory is freed and tried once more, because fragments of an odd size are the usual cause."""
    try:
        return _draw(runtime, record, control, lease)
    except OutOfMemoryError as error:
        log.warning("out of memory, freeing and trying once more: %s", error, extra={"request_id": record.id})
    runtime.engine.free()
    return _draw(runtime, record, control, lease)


def _draw(runtime: Runtime, record: RequestRecord, control: Control, lease: Lease) -> Drawn:
    settings, request, decision = runtime.settings, record.request, record.decision
    mode = control.mode or settings.worker.mode
    role = runtime.role() if mode == "roles" else None
    model = model_for(record, settings, role=role, mode=mode, degradation=control.degradation)
    size = parse_size(request.size) if request.size else None
    common: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed_of(record.id, request.seed),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "on_step": lease.on_step,
    }
    if decision is None or decision.source_uri is None:
        if request.num_inference_steps is None and control.degradation > settings.slo.floor_threshold_rungs:
            # Overload: the rungs of the hit threshold go first (the router's part), then steps of large images.
            common["num_inference_steps"] = min(settings.slo.floor_steps, settings.num_inference_steps)
        return runtime.engine.generate(GenerateParams(size=size, **common))
    source = runtime.store.read(decision.source_uri)
    return runtime.engine.refine(
        RefineParams(
            size=size or source.size,
            source=source,
            skipped_steps=decision.skipped_steps,
            total_steps=settings.num_inference_steps,
            **common,
        )
    )


def _ended(runtime: Runtime, record: RequestRecord, error: ModmError, written: list[str]) -> str:
    """The one ledger move that answers ``error``."""
    _drop(runtime, written)
    ledger, where = runtime.ledger, {"request_id": record.id, "worker": runtime.worker}
    try:
        if isinstance(error, LeaseLostError):
            return "lease lost, another attempt owns it"
        if isinstance(error, CancelledByUserError):
            ledger.finish_cancelled(record.id, record.attempt)
            return "cancelled"
        if isinstance(error, SourceImageError):
            log.warning("%s; sent to the large model", error, extra=where)
            state = ledger.reroute_to_large(record.id, record.attempt, str(error))
            return f"source gone, {TO_LARGE if state is State.QUEUED else state}"
        if isinstance(error, OutOfMemoryError):
            # Counted as an attempt: a request too big for every GPU must end, not visit them for ever.
            log.error("%s", error, extra=where)
            state = ledger.fail(record.id, record.attempt, str(error), retry=True)
            runtime.set_unwell(_ill(runtime))
            return f"out of memory, {AGAIN if state is State.QUEUED else state}"
        log.error("%s", error, extra=where)
        if isinstance(error, UnavailableError):
            state = ledger.give_back(record.id, record.attempt)
            return f"given back, {AGAIN if state is State.QUEUED else state}"
        # Another worker may do better than this one, but no worker can help a request that is wrong in itself.
        is_ours = isinstance(error, EngineError)
        state = ledger.fail(record.id, record.attempt, str(error), retry=is_ours)
        if is_ours:
            runtime.set_unwell(_ill(runtime))
        return f"failed: {error}; {AGAIN if state is State.QUEUED else state}"
    except LeaseLostError:
        return "lease lost, another attempt owns it"
    except UnavailableError as away:
        log.error("cannot report %s: %s; its lease will expire", error, away, extra=where)
        return "ledger away"


def _drop(runtime: Runtime, written: list[str]) -> None:
    """Delete what this attempt has written, so that nothing refers to it and nothing is left."""
    for uri in written:
        try:
            runtime.store.delete(uri)
        except (ModmError, OSError) as error:
            log.warning("cannot delete %s: %s", uri, error)
    written.clear()


def _ill(runtime: Runtime) -> str | None:
    """Tell an ill device from a request that was too big: one step of each model at its own size. None = well."""
    runtime.engine.free()
    try:
        for model in runtime.engine.resident():
            runtime.engine.probe(model)
    except EngineError as error:
        log.critical("unwell: %s", error, extra={"worker": runtime.worker})
        return str(error)
    return None


def _insist(call: Callable[[], T]) -> T:
    """Call until Redis answers, for at most INSIST_S. A finished image is worth waiting for a restart of the broker."""
    deadline, pause_s = time.monotonic() + INSIST_S, 0.1
    while True:
        try:
            return call()
        except UnavailableError as error:
            if time.monotonic() + pause_s > deadline:
                raise UnavailableError(f"the ledger did not answer for {INSIST_S:g} s: {error}") from error
            time.sleep(pause_s)
            pause_s = min(2.0, pause_s * 2)
