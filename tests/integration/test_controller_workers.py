"""The reconciler and the controller on real Celery workers (prefork, spawn, fake engine) and a real Redis.

One Redis of its own, because it is restarted here, and two workers, shared by the tests of this module. Every test begins
by giving both workers the roles it needs, so the order of the tests does not matter.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from modm_tasks.app import make_app
from modm_tasks.cluster import DesiredRole, RoleMove
from modm_tasks.errors import UnavailableError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest, WorkerStatus, new_request_id
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE, TASK_OF_QUEUE, Mode, Role
from modm_tasks.settings import Settings, load_settings
from ops.redis_server import RunningRedis, start_redis
from orchestrator.controller import roles
from orchestrator.controller.history import leader, ticks
from orchestrator.controller.loop import LOCK, Controller
from orchestrator.controller.plan import role_queues
from orchestrator.controller.reconcile import Reconciler, Round
from orchestrator.controller.remote import RemoteControl
from tests.conftest import child_environment
from tests.support.processes import Process, Processes, processes, wait_until

log = logging.getLogger(__name__)

L, S = LARGE_GEN, SMALL_REFINE
A, B = "gpu0@test", "gpu1@test"
DRAW_S = 2.5
CONTROLLER = (sys.executable, "-c", "from orchestrator.cli_controller import controller_app; controller_app()", "run")


@dataclass
class Rig:
    redis: RunningRedis
    settings: Settings
    ledger: Ledger
    remote: RemoteControl
    patient: RemoteControl
    group: Processes
    workers: dict[str, Process]

    def start_worker(self, name: str, *queues: str) -> None:
        """Plain Celery, with start queues that the controller has to mend."""
        celery = [sys.executable, "-m", "celery", "-A", "modm_tasks.app", "worker", "-n", name, "-Q", ",".join(queues)]
        options = ["-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
        self.workers[name] = self.group.start([*celery, *options], name=name)

    def ready(self, *names: str) -> None:
        def all_ready() -> bool:
            return {w.worker for w in self.ledger.workers()} >= set(names)

        try:
            wait_until(all_ready, 60, f"{names} to be ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.group.logs()}") from error

    def queues(self) -> dict[str, tuple[str, ...]]:
        """Ordered role queues of those that answer; nothing while the broker is away."""
        try:
            return {w: role_queues(q) for w, q in self.remote.active_queues([A, B]).items()}
        except UnavailableError:
            return {}

    def sees(self, expected: dict[str, tuple[str, ...]], timeout_s: float = 10.0) -> None:
        """Both workers answer with these queues."""
        wait_until(lambda: self.queues() == expected, timeout_s, f"queues {expected}")

    def round(self, mode: Mode = "roles", *, ready: list[WorkerStatus] | None = None) -> Round:
        return Reconciler(self.ledger, self.patient, verify_s=10).round(
            ready or self.ledger.workers(), self.ledger.desired_roles(), mode
        )

    def settle(self, first: Role, second: Role, mode: Mode = "roles") -> None:
        """Both workers in these roles, verified."""
        for name, role in ((A, first), (B, second)):
            roles.decide(self.ledger, name, role, reason="test")
        self.ready(A, B)
        wait_until(lambda: self._both(self.round(mode)), 20, "both workers in their roles")

    @staticmethod
    def _both(found: Round) -> bool:
        return len(found.queues) == 2 and not found.failed

    def submit(self, prompt: str, route: Route = Route.LARGE_GEN) -> str:
        request_id = new_request_id()
        self.ledger.accept(request_id, SubmitRequest(prompt=prompt))
        assert self.ledger.route(request_id, Decision(route=route, policy="test"))
        with make_app(self.settings) as app:
            app.send_task(TASK_OF_QUEUE[route.value], args=[request_id, 0, 0.0], queue=route.value)
        return request_id

    def record(self, request_id: str, *states: State) -> RequestRecord:
        def reached() -> RequestRecord | None:
            record = self.ledger.get(request_id)
            return record if record.state in states else None

        found = wait_until(reached, 20, f"request to be {states}; {self.group.logs()}")
        assert found is not None
        return found

    def moves(self, since_s: float) -> list[RoleMove]:
        return self.ledger.role_moves(since_s=since_s)

    @contextmanager
    def controller(self, **changes: object) -> Iterator[Controller]:
        """A controller on a thread of this process."""
        settings = self.settings.model_copy(
            update={"controller": self.settings.controller.model_copy(update={"allocation": "static", **changes})}
        )
        controller = Controller(settings, Ledger.from_settings(settings), RemoteControl.from_settings(settings))
        thread = threading.Thread(target=controller.run, name="controller")
        thread.start()
        try:
            wait_until(lambda: controller.leading, 15, "the controller to lead")
            yield controller
        finally:
            controller.stop()
            thread.join(15)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    home = tmp_path_factory.mktemp("controller")
    server = start_redis(home / "redis")
    environ = child_environment(server.url, home) | {
        "MODM_EMBEDDER": "fake",
        "MODM_WORKER__FAKE_LARGE_S": str(DRAW_S),
        "MODM_WORKER__FAKE_SMALL_S": "0.1",
    }
    settings = load_settings(redis_url=server.url, home=home, embedder="fake", worker={"engine": "fake"})
    remote, patient = RemoteControl.from_settings(settings), RemoteControl.from_settings(settings, timeout_s=5)
    with processes(home / "logs", environ) as group:
        rig = Rig(server, settings, Ledger.from_settings(settings), remote, patient, group, {})
        rig.start_worker(A, L, S)
        rig.start_worker(B, S)
        rig.ready(A, B)
        yield rig
    remote.close()
    patient.close()
    rig.redis.stop()


@pytest.fixture(autouse=True)
def fresh_control(rig: Rig) -> None:
    rig.ledger.set_control(mode=None, allocation=None, static_large=None, period_s=None)
    for name in (A, B):
        if rig.ledger.desired_roles().get(name, DesiredRole(role="small")).drained:
            roles.resume(rig.ledger, name)


def test_a_busy_worker_is_moved_at_once_and_finishes_what_it_draws(rig: Rig) -> None:
    rig.settle("large", "small")
    began = rig.ledger.now_s()
    running = rig.submit("a red circle")
    assert rig.record(running, State.RUNNING).worker == A
    waiting = rig.submit("a blue square")  # nobody else serves large-gen yet
    roles.decide(rig.ledger, A, "small", reason="swap")
    roles.decide(rig.ledger, B, "large", reason="swap")
    found = rig.round()
    assert found.queues == {A: (S,), B: (L, S)}
    assert rig.ledger.get(running).state is State.RUNNING  # the queues changed while it was drawing
    assert {(m.worker, m.old, m.new, m.reason) for m in rig.moves(began)} == {
        (A, "large", "small", "swap"),
        (B, "small", "large", "swap"),
    }
    done = rig.record(running, State.DONE)
    assert (done.worker, done.attempt) == (A, 1)
    first = rig.record(waiting, State.DONE)
    assert first.worker == B
    assert first.claimed_s is not None
    first_s = first.claimed_s - roles.decided(rig.ledger)[B].at_s
    log.info("from decision to first task in the new role: %.3f s; to verified: %s", first_s, found.took_s)
    # The bar is 1 s; docs/controller.md has the measured figures. A machine that runs other tests gets some room.
    assert first_s < 3.0
    assert set(found.took_s) == {A, B}
    assert max(found.took_s.values()) < 3.0
    assert all(row["took_s"] is not None for row in roles.timed_moves(rig.ledger, since_s=began))


def test_pooled_roles_differ_by_order_and_are_reordered(rig: Rig) -> None:
    rig.settle("large", "small", "pooled")
    rig.sees({A: (L, S), B: (S, L)})
    rig.settle("small", "large", "pooled")
    rig.sees({A: (S, L), B: (L, S)})
    rig.settle("small", "large", "roles")  # the mode alone changes the queues too
    rig.sees({A: (S,), B: (L, S)})
    assert {name: rig.queues()[name] for name in (A, B)} == {A: (S,), B: (L, S)}


def test_a_worker_without_role_queues_is_repaired_and_counted(rig: Rig) -> None:
    rig.settle("large", "small")
    before, began = roles.counts(rig.ledger).get("repairs", 0), rig.ledger.now_s()
    for queue in (L, S):
        rig.remote.send("cancel", queue, [A])
    wait_until(lambda: rig.queues().get(A) == (), 10, "the worker to lose its queues")
    assert rig.round().repaired == [A]
    rig.sees({A: (L, S), B: (S,)})
    assert roles.counts(rig.ledger)["repairs"] == before + 1
    assert rig.moves(began) == []


def test_drained_and_unwell_workers_consume_nothing(rig: Rig) -> None:
    rig.settle("large", "small")
    began = rig.ledger.now_s()
    roles.drain(rig.ledger, A)
    assert rig.round().queues == {A: (), B: (S,)}
    roles.resume(rig.ledger, A)
    assert rig.round().queues == {A: (L, S), B: (S,)}
    assert [(m.worker, m.old, m.new) for m in rig.moves(began)] == [(A, "large", None), (A, None, "large")]
    ill = [
        w.model_copy(update={"unwell": "no step is possible" if w.worker == B else None}) for w in rig.ledger.workers()
    ]
    assert rig.round(ready=ill).queues == {A: (L, S), B: ()}
    assert rig.round().queues == {A: (L, S), B: (S,)}
    assert len(rig.moves(began)) == 2  # an unwell worker keeps its role


def test_a_killed_worker_comes_back_to_its_role(rig: Rig) -> None:
    rig.settle("large", "large")
    repairs = roles.counts(rig.ledger).get("repairs", 0)
    with rig.controller(static_large=2):
        began = rig.ledger.now_s()
        rig.workers[B].kill()
        rig.ledger.worker_gone(B)  # else its last word would stand for its time to live
        rig.start_worker(B, S)
        rig.ready(A, B)
        wait_until(lambda: rig.queues().get(B) == (L, S), 15, "the worker to be brought back")
        wait_until(lambda: roles.counts(rig.ledger).get("repairs", 0) > repairs, 5, "the repair to be counted")
        assert rig.moves(began) == []


def drop_connections(ledger: Ledger) -> None:
    """Every connection of everybody, as a failing load balancer would."""
    for kind in ("normal", "pubsub"):
        ledger.redis.client_kill_filter(_type=kind, skipme=True)


def test_changed_queues_survive_dropped_connections(rig: Rig) -> None:
    """Celery before 5.7 came back without any queue, while ping answered (celery#7733)."""
    rig.settle("large", "small")
    rig.settle("small", "large")
    drop_connections(rig.ledger)
    rig.sees({A: (S,), B: (L, S)}, 20)
    assert rig.record(rig.submit("after the drop"), State.DONE).worker == B


def noticed(controller: Controller) -> bool:
    return bool(controller.metrics.registry.get_sample_value("modm_controller_outages_total"))


def test_everything_goes_on_after_a_restart_of_the_broker(rig: Rig) -> None:
    rig.settle("small", "large")
    with rig.controller(static_large=1) as controller:
        port = rig.redis.plan.port
        rig.redis.stop()
        wait_until(lambda: noticed(controller), 10, "the controller to notice")
        rig.redis = start_redis(rig.redis.plan.directory, port=port)
        rig.sees({A: (S,), B: (L, S)}, 30)
        wait_until(lambda: controller.leading, 15, "the controller to lead again")
        rig.ledger.set_control(static_large=2)
        wait_until(lambda: rig.queues().get(A) == (L, S), 15, "the controller to act again")
    assert rig.record(rig.submit("after the restart", Route.SMALL_REFINE), State.DONE).attempt == 1


def test_control_is_followed_within_a_second(rig: Rig) -> None:
    rig.settle("large", "small")
    with rig.controller(static_large=1, period_s=3600.0):
        rig.sees({A: (L, S), B: (S,)}, 10)
        changed = rig.ledger.now_s()
        rig.ledger.set_control(static_large=2)
        wait_until(lambda: rig.moves(changed), 10, "the move")
        (move,) = rig.moves(changed)
        assert (move.worker, move.new) == (B, "large")
        assert move.at_s - changed < 3.0  # 0.3 s on an idle machine; a busy one gets some room
        tick = ticks(rig.ledger, last=1)[0]
        assert (tick["why"], tick["n_large"], tick["changes"]) == ("control changed", 2, {B: "small -> large"})
        changed = rig.ledger.now_s()
        rig.ledger.set_control(mode="pooled", static_large=1)
        wait_until(lambda: set(rig.queues().values()) == {(L, S), (S, L)}, 10, "the pooled order")
        large, small = sorted((A, B), key=lambda w: rig.ledger.desired_roles()[w].role)
        roles.assign(rig.ledger, large, "small")
        rig.sees({large: (S, L), small: (L, S)})  # the controller plans around a pinned worker
        roles.assign(rig.ledger, large, "auto")


def test_slo_pools_workers_that_hold_both_models(rig: Rig) -> None:
    rig.settle("large", "small")
    with rig.controller(static_large=1, period_s=3600.0):
        rig.ledger.set_control(allocation="slo")
        wait_until(lambda: set(rig.queues().values()) == {(L, S), (S, L)}, 10, "pooled queues")
        rig.ledger.set_control(allocation="static")
        wait_until(lambda: set(rig.queues().values()) == {(L, S), (S,)}, 10, "published queues again")
        assert sorted(rig.ledger.desired_roles()[w].role for w in (A, B)) == ["large", "small"]


def test_a_failing_policy_does_not_stop_the_reconciler(rig: Rig) -> None:
    rig.settle("large", "small")
    with rig.controller(static_large=1):
        rig.ledger.set_control(allocation="no such policy")
        repairs = roles.counts(rig.ledger).get("repairs", 0)
        rig.remote.send("cancel", S, [A])
        wait_until(lambda: roles.counts(rig.ledger).get("repairs", 0) > repairs, 10, "the repair")
        rig.sees({A: (L, S), B: (S,)})
        assert roles.counts(rig.ledger)["repairs"] > repairs


def test_a_second_controller_takes_over_within_ten_seconds(rig: Rig) -> None:
    rig.settle("large", "small")
    options = ["--allocation", "static", "--static-large", "1", "--period-s", "3600"]
    both = [rig.group.start([*CONTROLLER, *options], name=f"controller{i}") for i in range(2)]

    def led_by(candidates: list[Process]) -> Callable[[], Process | None]:
        def now() -> Process | None:
            name = leader(rig.ledger, LOCK) or ""
            return next((p for p in candidates if f":{p.pid}:" in name), None)

        return now

    first = wait_until(led_by(both), 30, f"one to lead\n{rig.group.logs()}")
    assert first is not None
    (second,) = (p for p in both if p is not first)
    wait_until(lambda: "runs" in second.output(), 30, "the second to stand by")
    kept = wait_until(lambda: rig.ledger.document("controller"), 10, "the first decision")
    assert kept is not None
    first.signal(signal.SIGKILL)
    wait_until(led_by([second]), 10, "the second to take over")
    repairs = roles.counts(rig.ledger).get("repairs", 0)
    rig.remote.send("cancel", S, [A])
    wait_until(lambda: roles.counts(rig.ledger).get("repairs", 0) > repairs, 10, "the new leader to repair a worker")
    now = rig.ledger.document("controller")
    assert now is not None
    assert now["decided_s"] == pytest.approx(kept["decided_s"], abs=0.5)  # the period goes on, no decision is made anew
    assert second.stop() == 0
    assert leader(rig.ledger, LOCK) is None  # a clean end hands the lead over at once
