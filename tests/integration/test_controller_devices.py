"""Two real workers on devices of different speed: each is priced by its own, and the faster one becomes large."""

from __future__ import annotations

import sys
import threading

import pytest
from celery.utils.nodenames import worker_direct

from modm_tasks.app import make_app
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, Route, State, SubmitRequest, new_request_id
from modm_tasks.queues import SMALL_REFINE, TASK_OF_QUEUE
from orchestrator.controller.history import explain
from orchestrator.controller.loop import Controller
from orchestrator.controller.remote import RemoteControl
from orchestrator.controller.show import explained
from tests.conftest import SettingsFactory
from tests.support.processes import Processes, wait_until

#: By worker: seconds of a large and of a small image. The slow one comes first by name.
SPEEDS = {"gpu0@test": ("slow", 0.6, 0.3), "gpu1@test": ("swift", 0.2, 0.1)}


def test_workers_are_priced_by_their_own_device(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes
) -> None:
    chosen = {"allocation": "static", "static_large": 1, "period_s": 3600.0}
    made = settings(embedder="fake", worker={"engine": "fake"}, controller=chosen)
    ledger = Ledger.from_settings(made)
    for name, (device, large_s, small_s) in SPEEDS.items():
        celery = [sys.executable, "-m", "celery", "-A", "modm_tasks.app", "worker", "-n", name, "-Q", SMALL_REFINE]
        times = {"MODM_WORKER__FAKE_LARGE_S": str(large_s), "MODM_WORKER__FAKE_SMALL_S": str(small_s)}
        device_of = {"MODM_EMBEDDER": "fake", "MODM_WORKER__DEVICE_NAME": device}
        procs.start(
            [*celery, "-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle"],
            env=environ | device_of | times,
        )
    wait_until(lambda: len(ledger.workers()) == 2, 60, f"both workers to be ready\n{procs.logs()}")
    with make_app(made) as app:
        for name in SPEEDS:
            for route in (Route.LARGE_GEN, Route.SMALL_REFINE):
                request_id = new_request_id()
                ledger.accept(request_id, SubmitRequest(prompt="a boat"))
                assert ledger.route(request_id, Decision(route=route, policy="test"))
                app.send_task(TASK_OF_QUEUE[route.value], args=[request_id, 0, 0.0], queue=worker_direct(name))
                wait_until(lambda i=request_id: ledger.get(i).state is State.DONE, 20, f"the image\n{procs.logs()}")
    learned = ledger.device_step_s()
    assert set(learned) == {(m, d) for m in ("scenes-large", "scenes-small") for d in ("slow", "swift")}
    assert learned["scenes-large", "slow"] > 2 * learned["scenes-large", "swift"]

    controller = Controller(made, Ledger.from_settings(made), RemoteControl.from_settings(made))
    thread = threading.Thread(target=controller.run, name="controller")
    thread.start()
    try:
        wait_until(lambda: len(ledger.desired_roles()) == 2, 30, "the first decision")
        wait_until(lambda: explain(ledger, last=1)["ticks"], 10, "its reasons")
    finally:
        controller.stop()
        thread.join(15)
    assert {name: wanted.role for name, wanted in ledger.desired_roles().items()} == {
        "gpu0@test": "small", "gpu1@test": "large"
    }  # fmt: skip
    answer = explain(ledger, last=1)
    seen = answer["ticks"][0]["inputs"]
    for device, large_s, small_s in SPEEDS.values():
        assert seen["speeds"][device]["large_s"] == pytest.approx(large_s, rel=0.5)
        assert seen["speeds"][device]["small_s"] == pytest.approx(small_s, rel=0.5)
    # Rates add up: 1/0.6 + 1/0.2 a second are two workers of 0.3 s.
    assert seen["large_s"] == pytest.approx(0.3, rel=0.5)
    assert "on swift: 1 worker," in explained(answer)
    ledger.redis.close()
