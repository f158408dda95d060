"""A service and a worker in one process, without threads: requests are routed, images drawn and completions admitted when a
test says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import RequestRecord, State, SubmitRequest
from modm_tasks.settings import WorkerSettings
from orchestrator.build import build_service
from orchestrator.service import Service
from tests.conftest import SettingsFactory
from tests.support.processes import wait_until
from vector_store.embedder import load_embedder
from workers.runtime import Runtime
from workers.serve import serve_one
from workers.testing import FakeEngine

LARGE, SMALL = "large-gen", "small-refine"
FIRST, SECOND, THIRD = "one two three four five six", "one two three four five seven", "one two three nine five seven"
OTHER = "purple zebras juggle quietly beneath marble"


class Rig:
    """A service whose threads were not started, and a worker that draws when asked."""

    def __init__(self, service: Service) -> None:
        self.service, settings = service, service.settings
        engine = FakeEngine(settings)
        engine.load([settings.large_model, settings.small_model])
        self.runtime = Runtime(
            settings, worker="gpu0@test", engine=engine, embedder=load_embedder("fake"),
            store=ImageStore(settings.image_root), ledger=Ledger.from_settings(settings),
        )  # fmt: skip
        self.ledger = service.ledger

    def submit(self, prompt: str, **fields: Any) -> str:
        """Accept and route."""
        request_id = self.service.submit(SubmitRequest(prompt=prompt, **fields)).id
        self.service.parts.pipeline.route_batch([request_id])
        return request_id

    def draw(self, queue: str) -> str:
        """The worker serves the best of a queue and its completion arrives."""
        served = str(serve_one(self.runtime, queue)["served"])
        self.service.parts.admission.admit(served)
        return served

    def get(self, request_id: str) -> RequestRecord:
        return self.ledger.get(request_id)

    def waits_on(self, request_id: str) -> str | None:
        return self.ledger.field(request_id, "waits_on") if self.get(request_id).state is State.WAITING else None

    def ready(self, queue: str) -> list[str]:
        return [request_id for request_id, _ in self.ledger.ready(queue)]

    def looked(self, done: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            self.service.parts.watchdog.look()
            return done()

        wait_until(look, 20, what)


MakeRig = Callable[..., Rig]


def rigs(settings: SettingsFactory) -> Iterator[MakeRig]:
    """For a fixture: makes rigs that share a ledger and an image store, and closes them."""
    made: list[Rig] = []

    def make(**overrides: Any) -> Rig:
        worker = WorkerSettings(engine="fake", fake_large_s=0, fake_small_s=0, mode="pooled", max_attempts=1)
        made.append(Rig(build_service(settings(**({"worker": worker, "embedder": "fake"} | overrides)))))
        return made[-1]

    yield make
    for rig in made:
        rig.service.parts.cache.close()
        rig.runtime.ledger.redis.close()
