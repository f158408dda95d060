"""An exact repeat of a request that is still being drawn waits for it, and is then answered with its image. Found by
`make chaos`: it was put into a queue that no worker serves.
"""

from __future__ import annotations

import pytest
from PIL import Image

from modm_tasks.errors import ConflictError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Completion, Decision, Route, State, SubmitRequest
from orchestrator.build import build_service
from orchestrator.service import Service
from tests.conftest import SettingsFactory
from vector_store.embedder import encode_vector

PROMPT = "a red cat on a blue sofa in the evening"


def draw(service: Service) -> str:
    """What a worker and the completion's way do, for the best request of large-gen."""
    ledger, parts = service.ledger, service.parts
    claimed = ledger.claim("large-gen", "w", lease_s=30)
    assert claimed is not None
    image = Image.new("RGB", (64, 64), "red")
    uri, size = parts.images.write(claimed.id, claimed.attempt, image)
    vector = encode_vector(parts.embedder.embed_texts([claimed.request.prompt])[0])
    ledger.finish(
        claimed.id,
        claimed.attempt,
        Completion(
            uri=uri, width=64, height=64, seed=claimed.request.seed or 0, model="scenes-large", steps_run=50,
            skipped_steps=0, depth=0, gpu_s=1.0, vector=vector, embedder=parts.embedder.identity, bytes=size,
        ),
    )  # fmt: skip
    parts.admission.admit(claimed.id)
    return claimed.id


@pytest.fixture
def service(settings: SettingsFactory) -> Service:
    return build_service(settings(embedder="fake", routing={"policy": "modm-plus"}))


def submit(service: Service, **fields: object) -> str:
    request_id = service.submit(SubmitRequest.model_validate({"prompt": PROMPT, "seed": 7} | fields)).id
    service.parts.pipeline.route_batch([request_id])
    return request_id


@pytest.mark.parametrize("image_is_there", [True, False])
def test_a_repeat_that_waited_is_answered_or_drawn_but_never_left(service: Service, image_is_there: bool) -> None:
    ledger = service.ledger
    try:
        first, repeat, third = (submit(service) for _ in range(3))
        assert [ledger.get(i).state for i in (repeat, third)] == [State.WAITING] * 2
        if not image_is_there:
            service.parts.pipeline.router.stored_completion = lambda *_: None  # type: ignore[method-assign]
        assert draw(service) == first
        service.parts.watchdog.look()
        for request_id in (repeat, third):
            record = ledger.get(request_id)
            assert record.decision is not None
            if image_is_there:
                assert (record.state, record.decision.route) == (State.DONE, Route.STORED)
                assert record.completion is not None
                assert service.image_uri(request_id) == service.image_uri(first)
            else:
                assert record.state is State.QUEUED
                assert request_id in [i for i, _ in ledger.ready(record.decision.route.value)]
                assert record.decision.route is not Route.STORED
        assert ledger.counts()["waiting"] == 0
        assert (ledger.counts()["open"] == 0) is image_is_there
    finally:
        service.parts.cache.close()


def test_a_stored_answer_can_never_be_queued(service: Service) -> None:
    try:
        request_id = service.submit(SubmitRequest(prompt=PROMPT)).id
        decision = Decision(route=Route.STORED, policy="modm-plus", source_id=request_id)
        ledger: Ledger = service.ledger
        with pytest.raises(ConflictError, match="nobody would serve it"):
            ledger.route(request_id, decision)
        assert ledger.get(request_id).state is State.ACCEPTED
    finally:
        service.parts.cache.close()
