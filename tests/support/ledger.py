"""Requests in a ledger at one point of their way, for its tests."""

from __future__ import annotations

from typing import Any

from modm_tasks.ledger import Ledger
from modm_tasks.messages import Completion, Decision, Route, SubmitRequest, new_request_id

MISS = Decision(route=Route.LARGE_GEN, policy="modm", reason="miss")


def hit(source: str = "s", k: int = 10) -> Decision:
    uri = f"{source}.png"
    return Decision(
        route=Route.SMALL_REFINE, policy="modm", skipped_steps=k, source_id=source, source_uri=uri, similarity=0.9
    )


def completion(**more: Any) -> Completion:
    base = {
        "uri": "ab/x-1.png", "width": 64, "height": 64, "seed": 1, "model": "m", "steps_run": 50, "skipped_steps": 0,
        "depth": 0, "gpu_s": 1.0, "vector": "AAAA", "embedder": "fake",
    }  # fmt: skip
    return Completion(**(base | more))


def accept(ledger: Ledger, prompt: str = "a cat", **more: Any) -> str:
    options = {k: more.pop(k) for k in list(more) if k in {"max_open", "max_client_open", "slo_s", "rank_offset_s"}}
    request_id, _ = ledger.accept(new_request_id(), SubmitRequest(prompt=prompt, **more), **options)
    return request_id


def queued(ledger: Ledger, prompt: str = "a cat", decision: Decision = MISS, **more: Any) -> str:
    request_id = accept(ledger, prompt, **more)
    assert ledger.route(request_id, decision)
    return request_id
