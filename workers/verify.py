"""Verified hits on the worker's side: which floor holds for a refined image, and whether it may be drawn again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from modm_tasks import verification
from modm_tasks.cluster import Control
from modm_tasks.errors import ModmError
from modm_tasks.messages import Completion, RequestRecord, Route

if TYPE_CHECKING:
    from vector_store.embedder import Vector
    from workers.runtime import Runtime

log = logging.getLogger(__name__)

#: Guess at an average hit, as a share of a full small image; the router's.
HIT_SHARE = 0.6


def verify_floor(record: RequestRecord, control: Control) -> float | None:
    """Lowest image-to-prompt cosine at which a refined hit is kept, or None when it is not to be verified.

    The router says whether, and gives the floor of the ladder's rung; an operator's in the runtime control goes first.
    """
    decision = record.decision
    if decision is None or decision.route is not Route.SMALL_REFINE or decision.source_uri is None:
        return None
    if decision.verify_floor is None:
        return None
    floor = decision.verify_floor if control.verify_floor is None else control.verify_floor
    return floor if floor > verification.NO_FLOOR else None


def score(runtime: Runtime, record: RequestRecord, image: Vector) -> float:
    """Cosine of image and prompt. The prompt's vector is the router's where it is of this embedder's size."""
    from vector_store.embedder import decode_vector

    text = runtime.ledger.field(record.id, "tvec")
    prompt = decode_vector(text) if text else None
    if prompt is None or prompt.shape != image.shape:
        prompt = runtime.embedder.embed_texts([record.request.prompt])[0]
    return float(prompt @ image)


def reason(record: RequestRecord, found: float, floor: float) -> str:
    """Why it is drawn again, with what it was drawn from: the decision that says so takes the place of the router's."""
    was = record.decision
    before = "" if was is None else f"; before that {was.reason}, from {was.source_id}"
    return f"verify: score {found:.4f} below {floor:.4f}{before}"


def drop_fallback(runtime: Runtime, record: RequestRecord) -> None:
    """Delete the refined image that a second drawing has replaced. Best effort: what is left, `modm cache verify` finds."""
    if record.decision is None or record.decision.policy != "reroute":
        return
    try:
        if text := runtime.ledger.field(record.id, "fallback"):
            runtime.store.delete(Completion.model_validate_json(text).uri)
    except (ModmError, OSError) as error:
        log.warning("the image of the first drawing is left: %s", error, extra={"request_id": record.id})


def may_escalate(runtime: Runtime, record: RequestRecord, found: float, floor: float) -> bool:
    """Whether deadline, backlog and the window's share of escalated hits leave room for one more (rarely asked)."""
    settings, ledger, control = runtime.settings, runtime.ledger, runtime.control()
    now_s, counts, steps = ledger.now_s(), ledger.counts(), ledger.step_s()
    large_s = settings.slo.large_latency_s or steps.get(settings.large_model, 0.0) * settings.num_inference_steps
    small_s = steps.get(settings.small_model, 0.0) * settings.num_inference_steps
    queued_s = counts["ready:large-gen"] * large_s + counts["ready:small-refine"] * small_s * HIT_SHARE
    window = ledger.window(
        window_s=settings.controller.window_s, bucket_s=control.bucket_s or settings.controller.bucket_s, now_s=now_s
    )
    load = verification.Load(
        hits=window.get("hits", 0.0),
        escalated=window.get("escalated", 0.0),
        wait_s=queued_s / max(1, len(ledger.workers())),
        slo_s=record.request.deadline_s or settings.slo.multiple * large_s,
        age_s=now_s - record.arrival_s,
        large_s=large_s,
    )
    rate = settings.routing.escalation_rate if control.escalation_rate is None else control.escalation_rate
    return verification.may_escalate(found, floor, load, rate=rate)
