"""Overload on a real worker with the bundled models: hits are refined by the faster small model, and then not any more."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from PIL import Image

import workers
from modm_tasks.app import make_app
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Completion, Decision, Route, State, SubmitRequest, new_request_id
from modm_tasks.queues import SMALL_REFINE, TASK_OF_QUEUE
from modm_tasks.settings import Settings
from orchestrator.controller.history import ticks
from orchestrator.controller.loop import Controller
from orchestrator.controller.remote import RemoteControl
from tests.conftest import SettingsFactory
from tests.support.processes import Processes, wait_until

#: The bundled small model with a third of its steps. Its speed is known from a profile, as the step needs it.
CATALOGUE = """[scenes-swift]
folder = "{folder}"
max_steps = 16
"""
PROFILE = """device = "this machine, roughly"
total_steps = 50
[models.scenes-large]
image_s = 1.0
[models.scenes-small]
image_s = 0.3
[models.scenes-swift]
image_s = 0.1
"""
WORKER = {"MODM_WORKER__ENGINE": "diffusers", "MODM_SLO__FALLBACK_SMALL_MODEL": "scenes-swift"}
REQUESTS = 30
LAST = 3  # threshold, steps of large images, faster small model


class Load:
    """Hits on one image."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings, self.ledger = settings, ledger
        self.source = new_request_id()
        self.uri, _ = ImageStore(settings.image_root).write(self.source, 1, Image.new("RGB", (64, 64), "red"))

    def submit(self, many: int) -> list[str]:
        decision = Decision(
            route=Route.SMALL_REFINE, policy="test", skipped_steps=10, source_id=self.source, source_uri=self.uri
        )
        sent = []
        with make_app(self.settings) as app:
            for _ in range(many):
                sent.append(new_request_id())
                self.ledger.accept(sent[-1], SubmitRequest(prompt="a red circle"))
                assert self.ledger.route(sent[-1], decision)
                app.send_task(TASK_OF_QUEUE[SMALL_REFINE], args=[sent[-1], 0, 0.0], queue=SMALL_REFINE)
        return sent

    def done(self, request_id: str) -> Completion | None:
        record = self.ledger.get(request_id)
        assert record.state not in {State.FAILED, State.CANCELLED}, record.error
        return record.completion if record.state is State.DONE else None


def test_hits_are_refined_by_the_faster_model_under_overload_and_no_longer(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes, tmp_path: Path
) -> None:
    models, profile = tmp_path / "models.toml", tmp_path / "speeds.toml"
    models.write_text(CATALOGUE.format(folder=Path(workers.__file__).parent / "weights" / "scenes-small"))
    profile.write_text(PROFILE)
    made = settings(
        models_file=models,
        slo={"degrade": True, "large_latency_s": 0.3, "fallback_small_model": "scenes-swift"},
        controller={"profile": str(profile), "period_s": 0.4, "window_s": 3.0, "bucket_s": 0.5, "min_dwell_s": 0.0},
    )
    ledger = Ledger.from_settings(made)
    celery = [sys.executable, "-m", "celery", "-A", "modm_tasks.app", "worker", "-n", "gpu0@test", "-Q", SMALL_REFINE]
    procs.start(
        [*celery, "-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle"],
        env=environ | WORKER | {"MODM_MODELS_FILE": str(models)},
    )
    wait_until(ledger.workers, 60, f"the worker to be ready\n{procs.logs()}")
    assert set(ledger.workers()[0].models) == {"scenes-large", "scenes-small", "scenes-swift"}
    load = Load(made, ledger)
    controller = Controller(made, Ledger.from_settings(made), RemoteControl.from_settings(made))
    thread = threading.Thread(target=controller.run, name="controller")
    thread.start()
    try:
        (calm,) = load.submit(1)
        before = wait_until(lambda: load.done(calm), 20, f"a hit before the load\n{procs.logs()}")
        assert before is not None
        assert (before.model, before.steps_run) == ("scenes-small", 40)
        sent = load.submit(REQUESTS)  # some seconds of work, 0.6 s are allowed
        wait_until(lambda: ledger.control().degradation == LAST, 15, f"the last step\n{ticks(ledger, last=3)}")
        wait_until(lambda: all(load.done(i) for i in sent), 40, f"all to be done\n{procs.logs()}")
        found = [load.done(i) for i in sent]
        swift = [c for c in found if c is not None and c.model == "scenes-swift"]
        assert len(swift) > REQUESTS / 3, "most were drawn on the last step"
        assert {c.steps_run for c in swift} == {13}  # k = 10 of 50 is 3 of 16
        wait_until(lambda: ledger.control().degradation == 0, 30, f"the steps to be undone\n{ticks(ledger, last=3)}")
        (after,) = load.submit(1)
        last = wait_until(lambda: load.done(after), 20, "a hit after the load")
        assert last is not None
        assert last.model == "scenes-small"
    finally:
        controller.stop()
        thread.join(15)
    reasons = [tick["reason"] for tick in ticks(ledger, last=200)]
    assert any("degrades to 'faster small model'" in reason for reason in reasons)
    assert any("back to 'full quality'" in reason for reason in reasons)
    ledger.redis.close()
