"""What the ledger's scripts are given, and what their answers mean. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modm_tasks.errors import ConflictError, RefusedError
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest


def accepting(
    request_id: str, request: SubmitRequest, slo_s: float, max_open: int, max_client_open: int, rank_offset_s: float
) -> tuple[object, ...]:
    """Arguments of ACCEPT."""
    arrival = "" if request.arrival_s is None else request.arrival_s
    return (
        request_id, request.model_dump_json(), arrival, request.client, request.idempotency_key or "", max_open,
        max_client_open, slo_s, rank_offset_s,
    )  # fmt: skip


def accepted(
    request_id: str, request: SubmitRequest, reply: Sequence[Any], max_open: int, max_client_open: int
) -> tuple[str, RequestRecord | None]:
    """Its answer: (id, the new request's record; None where an idempotency key has been seen before). Raises RefusedError
    where too much is open."""
    if reply[0] == "full":
        whose, limit = ("of this client's ", max_client_open) if reply[1] == "client" else ("", max_open)
        raise RefusedError(f"{limit} {whose}requests are unfinished; that is the limit", retry_after_s=5)
    if reply[0] != "ok":
        return reply[1], None
    arrival_s, accepted_s, rank = map(float, reply[2:])
    return reply[1], RequestRecord(
        id=request_id, state=State.ACCEPTED, request=request, rank=rank, arrival_s=arrival_s, accepted_s=accepted_s
    )


def routing(
    request_id: str, decision: Decision, expected: State, text_vector: str, rank: float | None
) -> tuple[object, ...]:
    """Arguments of ROUTE."""
    if decision.route is Route.STORED:
        raise ConflictError("a stored answer is no queue: nobody would serve it")
    return (
        request_id, expected.value, decision.route.value, decision.model_dump_json(), decision.skipped_steps,
        decision.source_id or "", decision.reason[:300], text_vector, "" if rank is None else rank,
    )  # fmt: skip


def text_of(value: object) -> str:
    """A script's arguments are texts."""
    return format(value, ".6f") if isinstance(value, float) else str(value)
