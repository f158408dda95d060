"""Seconds from a decision to the first task of the new role, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from modm_tasks.messages import RequestRecord, new_request_id
from orchestrator.controller.witness import first_tasks


def record(route: str, queued_s: float, claimed_s: float, done_s: float, worker: str = "a") -> RequestRecord:
    decision = {"route": route, "policy": "modm"}
    times = {"queued_s": queued_s, "claimed_s": claimed_s, "done_s": done_s}
    fields: dict[str, Any] = {"id": new_request_id(), "state": "done", "request": {"prompt": "p"}, "worker": worker}
    return RequestRecord.model_validate(fields | {"decision": decision} | times)


def move(at_s: float, new: str, took_s: float | None, worker: str = "a") -> dict[str, Any]:
    return {"at_s": at_s, "worker": worker, "old": "x", "new": new, "took_s": took_s}


def test_the_draw_in_hand_is_told_apart() -> None:
    records = [
        record("large-gen", 90, 99.5, 100.6),  # drawn while the decision at 100.0 fell
        record("small-refine", 99, 100.65, 100.9),
        record("small-refine", 99, 100.2, 100.3, worker="b"),
    ]
    found = first_tasks([move(100.1, "small", 0.1)], records)
    (row,) = found["first_tasks"]
    assert row["first_task_s"] == pytest.approx(0.65)
    assert row["drawing_s"] == pytest.approx(0.6)
    assert row["work_waited"]
    assert found["slowest_first_task_after_drawing_s"] == pytest.approx(0.05)
    assert found["slowest_verified_s"] == 0.1


def test_moves_that_nothing_followed_say_nothing() -> None:
    later = [record("large-gen", 120, 120.5, 121)]
    # The hit's queue was never served again, the second move came before any large image, the third has no decision.
    moves = [move(100.0, "small", 0.1), move(110.0, "large", 0.1), move(115.0, "small", 0.1), move(119, "large", None)]
    found = first_tasks(moves, later)
    assert found["first_tasks"] == []
    assert found["slowest_first_task_s"] is None
    # A task that came to an empty queue is listed, but its wait is no property of the move.
    found = first_tasks([move(119.0, "large", 0.1)], later)
    assert [row["work_waited"] for row in found["first_tasks"]] == [False]
    assert found["slowest_first_task_s"] is None
