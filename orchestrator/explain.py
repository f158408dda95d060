"""What became of a request and why, for `modm requests explain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modm_tasks.ledger import Ledger
from modm_tasks.messages import Completion, State


def explain(ledger: Ledger, request_id: str) -> dict[str, Any]:
    """Record, transitions, who waits on whom, and of an escalated request its first drawing. Raises NotFoundError."""
    record, log = ledger.get(request_id), ledger.log(request_id)
    queue = record.decision.route.value if record.decision else None
    fallback = ledger.field(request_id, "fallback")
    return {
        "record": record.model_dump(mode="json"),
        "position": ledger.position(request_id, queue) if queue and record.state is State.QUEUED else None,
        "transitions": [{"at_s": at, "state": state, "note": note} for at, state, note in log],
        "waited_s": waited_s(log, ledger.now_s()),
        "waits_on": ledger.field(request_id, "waits_on"),
        "waited_on": waited_on(log),
        "escalated": fallback is not None,
        "refined_first": None if fallback is None else _first_drawing(fallback),
        "waiters": ledger.waiters(request_id),
    }


def waited_s(log: Sequence[tuple[float, str, str]], now_s: float) -> float | None:
    """Seconds that a request waited on another one's image, from its transitions; None where it never did."""
    ends = [at for at, _, _ in log[1:]] + [now_s]
    spans = [end - at for (at, state, _), end in zip(log, ends, strict=True) if state == State.WAITING.value]
    return round(sum(spans), 3) if spans else None


def waited_on(log: Sequence[tuple[float, str, str]]) -> list[str]:
    """The requests whose images it waited for, this one's included that it waits for now."""
    return [note.removeprefix("on ") for _, state, note in log if state == State.WAITING.value]


def _first_drawing(fallback: str) -> dict[str, Any]:
    """Of a request that was drawn again: the refined image that scored too low."""
    first = Completion.model_validate_json(fallback)
    return {"model": first.model, "skipped_steps": first.skipped_steps, "clip_score": first.clip_score}
