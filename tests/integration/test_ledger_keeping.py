"""What the ledger keeps and counts, against a real Redis: windows, trimming, workers, roles, control, leadership."""

from __future__ import annotations

import pytest

from modm_tasks.cluster import DesiredRole, RoleMove
from modm_tasks.errors import InvalidInputError, NotFoundError, UnavailableError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import WorkerStatus, new_request_id
from modm_tasks.redis_client import connect
from tests.support.ledger import completion, hit, queued


def test_windows_count_what_happened(ledger: Ledger) -> None:
    request_id = queued(ledger, slo_s=1e-6)
    queued(ledger, decision=hit(k=15))
    ledger.claim("large-gen", "w", lease_s=5)
    ledger.finish(request_id, 1, completion(gpu_s=2.0))
    window = ledger.window(window_s=60, bucket_s=10, now_s=ledger.now_s())
    assert window["arrivals"] == 2
    assert (window["hits"], window["misses"], window["k:15"]) == (1, 1, 1)
    assert window["model:m:gpu_s"] == pytest.approx(2.0)
    assert (window["slo_total"], window["slo_missed"]) == (1, 1)
    assert ledger.step_s() == {"m": pytest.approx(0.04)}


def test_trim_forgets_old_requests_but_not_sources_in_use(ledger: Ledger) -> None:
    old = queued(ledger)
    ledger.claim("large-gen", "w", lease_s=5)
    ledger.finish(old, 1, completion())
    assert ledger.trim(keep_s=0, keep=0) == []  # not admitted yet
    ledger.admitted(old, None)
    user = queued(ledger, decision=hit(old))
    assert ledger.trim(keep_s=0, keep=0) == []
    ledger.cancel(user)
    forgotten = dict(ledger.trim(keep_s=0, keep=0))
    assert forgotten == {old: "ab/x-1.png", user: ""}
    with pytest.raises(NotFoundError):
        ledger.get(old)


def test_trim_passes_over_what_must_stay(ledger: Ledger) -> None:
    """A few old sources in use do not keep everything behind them."""
    finished = []
    for _ in range(12):
        request_id = queued(ledger)
        ledger.claim("large-gen", "w", lease_s=5)
        ledger.finish(request_id, 1, completion())
        ledger.admitted(request_id, None)
        finished.append(request_id)
    users = [queued(ledger, decision=hit(source)) for source in finished[:6]]
    assert [i for i, _ in ledger.trim(keep_s=0, keep=0, limit=2)] == finished[6:8]
    assert [i for i, _ in ledger.trim(keep_s=86_400, keep=8, limit=2)] == finished[8:10]
    assert ledger.trim(keep_s=86_400, keep=8, limit=2) == []
    assert [i for i, _ in ledger.trim(keep_s=0, keep=0)] == finished[10:]
    for user in users:
        ledger.cancel(user)
    assert {i for i, _ in ledger.trim(keep_s=0, keep=0)} == {*finished[:6], *users}


def test_cluster_state(ledger: Ledger) -> None:
    status = WorkerStatus(
        worker="gpu0@h", gpu="0", host="h", pid=1, device="cpu", models=("a",), large_model="a", small_model="b",
        embedder="fake", started_s=1.0,
    )  # fmt: skip
    ledger.worker_ready(status, 10)
    assert [w.worker for w in ledger.workers()] == ["gpu0@h"]
    ledger.worker_gone("gpu0@h")
    assert ledger.workers() == []
    ledger.set_desired_role("gpu0@h", DesiredRole(role="small", epoch=3))
    assert ledger.desired_role("gpu0@h") == "small"
    ledger.record_move(RoleMove(at_s=5.0, worker="gpu0@h", old="large", new="small", epoch=3))
    assert len(ledger.role_moves(since_s=5.0)) == 1
    assert ledger.role_moves(since_s=6.0) == []
    assert ledger.set_control(mode="pooled", period_s=5.0).mode == "pooled"
    assert ledger.set_control(mode=None).mode is None
    assert ledger.control().period_s == 5.0
    with pytest.raises(InvalidInputError, match="control"):
        ledger.set_control(period_s=-1)
    assert ledger.lead("controller", "me", 5)
    assert ledger.lead("controller", "me", 5)
    assert not ledger.lead("controller", "you", 5)
    ledger.stop_leading("controller", "me")
    assert ledger.lead("controller", "you", 5)


def test_a_redis_that_is_away_is_one_error() -> None:
    away = Ledger(connect("redis://127.0.0.1:1/0"))
    with pytest.raises(UnavailableError, match="Redis does not answer"):
        away.get(new_request_id())
