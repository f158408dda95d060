"""Who counts when GPUs are shared out."""

from __future__ import annotations

from modm_tasks.cluster import DesiredRole
from modm_tasks.messages import WorkerStatus
from orchestrator.controller.members import FORGET_S, Members, Watch, covered


def status(name: str, *, unwell: str | None = None) -> WorkerStatus:
    return WorkerStatus(
        worker=name, gpu="0", host="h", pid=1, device="fake", models=("l", "s"), large_model="l", small_model="s",
        embedder="fake", unwell=unwell, started_s=0.0,
    )  # fmt: skip


LARGE, SMALL = DesiredRole(role="large", epoch=1), DesiredRole(role="small", epoch=2)


def test_ready_and_well_workers_count_in_order_of_name() -> None:
    watch = Watch(grace_s=20)
    ready = [status("b"), status("a"), status("c", unwell="the device does not answer"), status("d")]
    desired = {"a": LARGE, "d": DesiredRole(role="small", drained=True)}
    assert watch.members(ready, desired, "roles", now_s=0.0) == Members(here=("a", "b"))


def test_a_restarting_worker_keeps_its_place_for_the_grace_time() -> None:
    watch = Watch(grace_s=20)
    desired = {"a": LARGE, "b": SMALL}
    watch.members([status("a"), status("b")], desired, "roles", now_s=0.0)
    assert watch.members([status("a")], desired, "roles", now_s=19.0) == Members(here=("a", "b"), away=("b",))
    assert watch.members([status("a")], desired, "roles", now_s=20.0) == Members(here=("a",))


def test_there_is_no_grace_when_a_queue_is_left_unserved() -> None:
    watch = Watch(grace_s=20)
    desired = {"a": LARGE, "b": SMALL}
    watch.members([status("a"), status("b")], desired, "roles", now_s=0.0)
    assert watch.members([status("b")], desired, "roles", now_s=1.0) == Members(here=("b",))
    assert watch.members([status("b")], desired, "pooled", now_s=1.0) == Members(here=("a", "b"), away=("a",))


def test_coverage_follows_the_queues_of_the_mode() -> None:
    assert covered(["a"], {"a": LARGE}, "roles")
    assert not covered(["b"], {"b": SMALL}, "roles")
    assert covered(["b"], {"b": SMALL}, "pooled")
    assert not covered(["c"], {}, "pooled")


def test_long_gone_workers_are_forgotten_unless_an_operator_spoke_of_them() -> None:
    watch = Watch(grace_s=20)
    desired = {"a": LARGE, "b": SMALL, "c": DesiredRole(role="small", pinned=True)}
    watch.members([status("a")], desired, "roles", now_s=0.0)
    watch.members([status("a")], desired, "roles", now_s=FORGET_S + 1)
    assert watch.forgotten(desired, now_s=FORGET_S + 1) == ["b"]
