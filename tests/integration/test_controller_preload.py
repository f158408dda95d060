"""A move between models that do not fit together: the model is loaded before the traffic comes."""

from __future__ import annotations

import sys

import pytest

from modm_tasks.app import make_app
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, Route, State, SubmitRequest, new_request_id
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE, TASK_OF_QUEUE
from orchestrator.controller import roles
from orchestrator.controller.observe import switch_s
from orchestrator.controller.reconcile import Reconciler
from orchestrator.controller.remote import RemoteControl
from tests.conftest import SettingsFactory
from tests.support.processes import Processes, wait_until

WORKER, SWAP_S = "gpu0@test", 0.5
FAKE = {
    "MODM_EMBEDDER": "fake",
    "MODM_WORKER__ENGINE": "fake",
    "MODM_WORKER__FAKE_SWAP_S": str(SWAP_S),
    "MODM_WORKER__FAKE_LARGE_S": "1.0",
}
#: The bundled models, whose weights take 24 and 7 MiB: either fits, not both.
BUNDLED = {"MODM_EMBEDDER": "scenes-clip", "MODM_WORKER__ENGINE": "diffusers", "MODM_WORKER__MEMORY_MIB": "28"}


@pytest.mark.parametrize("engine", [FAKE, BUNDLED], ids=["fake", "diffusers"])
def test_the_model_is_loaded_by_the_direct_queue_before_the_role_moves(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes, engine: dict[str, str]
) -> None:
    made = settings(embedder=engine["MODM_EMBEDDER"], worker={"engine": engine["MODM_WORKER__ENGINE"]})
    ledger, remote = Ledger.from_settings(made), RemoteControl.from_settings(made, timeout_s=5)
    celery = [sys.executable, "-m", "celery", "-A", "modm_tasks.app", "worker", "-n", WORKER, "-Q", LARGE_GEN]
    procs.start([*celery, "-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle"], env=environ | engine)
    wait_until(ledger.workers, 60, f"the worker to be ready\n{procs.logs()}")
    reconciler = Reconciler(ledger, remote, verify_s=10)

    def submit(route: Route, **request: int) -> str:
        request_id = new_request_id()
        ledger.accept(request_id, SubmitRequest(prompt="a red circle", **request))
        assert ledger.route(request_id, Decision(route=route, policy="test"))
        with make_app(made) as app:
            app.send_task(TASK_OF_QUEUE[route.value], args=[request_id, 0, 0.0], queue=route.value)
        return request_id

    def ended(request_id: str) -> bool:
        return ledger.get(request_id).state is State.DONE

    def look() -> tuple[str, ...]:
        return reconciler.round(ledger.workers(), ledger.desired_roles(), "roles").queues[WORKER]

    roles.decide(ledger, WORKER, "large", reason="test")
    assert look() == (LARGE_GEN, SMALL_REFINE)  # its first role: nothing to wait for
    price_s = switch_s(ledger.workers())  # the price stands in the snapshot
    assert price_s == SWAP_S if engine is FAKE else price_s > 0
    loaded = submit(Route.LARGE_GEN)
    wait_until(lambda: ended(loaded) and ledger.workers()[0].models == ("scenes-large",), 15, "the large model")
    first = submit(Route.LARGE_GEN, num_inference_steps=60)  # long enough to be moved under it
    wait_until(lambda: ledger.get(first).state is State.RUNNING, 10, "the large image to begin")
    roles.decide(ledger, WORKER, "small", reason="test")
    hit = submit(Route.SMALL_REFINE)
    assert look() == ()  # no traffic of either role while the large image ends and the small model is loaded
    assert ledger.get(first).state is State.RUNNING
    assert ledger.role_moves(since_s=0.0) == []
    wait_until(lambda: ledger.workers()[0].models == ("scenes-small",), 30, f"the load\n{procs.logs()}")
    assert ended(first)
    assert ledger.get(hit).state is State.QUEUED
    assert look() == (SMALL_REFINE,)
    assert [(m.old, m.new) for m in ledger.role_moves(since_s=0.0)] == [("large", "small")]
    wait_until(lambda: ended(hit), 10, "the hit")
    completion = ledger.get(hit).completion
    assert completion is not None
    assert completion.load_s == 0.0  # it found its model there
    remote.close()
    ledger.redis.close()
