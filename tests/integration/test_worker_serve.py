"""One claim from start to finish, in this process: the fake engine, a real ledger and a real image store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from modm_tasks.errors import EngineError, InvalidInputError, OutOfMemoryError, SourceImageError, UnavailableError
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest, new_request_id
from modm_tasks.settings import WorkerSettings
from tests.conftest import SettingsFactory
from tests.support.processes import wait_until
from vector_store.embedder import decode_vector, load_embedder
from workers.engine import Drawn, GenerateParams
from workers.lease import Lease
from workers.runtime import Runtime
from workers.serve import UNWELL, serve_one
from workers.testing import FakeEngine

LARGE, SMALL = "large-gen", "small-refine"


class Troubled(FakeEngine):
    """A fake engine whose next draws and probes raise what they are told to."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.draws: list[Exception | None] = []
        self.ill: EngineError | None = None
        self.freed = 0

    def _run(self, params: GenerateParams, start: int) -> Drawn:
        error = self.draws.pop(0) if self.draws else None
        if error is not None:
            raise error
        return super()._run(params, start)

    def free(self) -> None:
        self.freed += 1

    def probe(self, model: str) -> None:
        if self.ill is not None:
            raise self.ill


@pytest.fixture
def runtime(settings: SettingsFactory) -> Iterator[Runtime]:
    worker = WorkerSettings(engine="fake", fake_large_s=0.05, fake_small_s=0.02, lease_s=5.0, mode="pooled")
    chosen = settings(worker=worker, embedder="fake")
    engine = Troubled(chosen)
    engine.load([chosen.large_model, chosen.small_model])
    made = Runtime(
        chosen,
        worker="gpu0@test",
        engine=engine,
        embedder=load_embedder("fake"),
        store=ImageStore(chosen.image_root),
        ledger=Ledger.from_settings(chosen),
    )
    yield made
    made.ledger.redis.close()


def engine_of(runtime: Runtime) -> Troubled:
    assert isinstance(runtime.engine, Troubled)
    return runtime.engine


def submit(runtime: Runtime, decision: Decision | None = None, **request: Any) -> str:
    request_id = new_request_id()
    runtime.ledger.accept(request_id, SubmitRequest(**({"prompt": "a red fox"} | request)))
    assert runtime.ledger.route(request_id, decision or Decision(route=Route.LARGE_GEN, policy="test"))
    return request_id


def served(runtime: Runtime, request_id: str, queue: str = LARGE) -> RequestRecord:
    assert serve_one(runtime, queue)["served"] == request_id
    return runtime.ledger.get(request_id)


def test_a_token_that_finds_nothing_ends(runtime: Runtime) -> None:
    assert serve_one(runtime, LARGE)["served"] is None


def test_the_ledgers_order_counts_not_the_tokens(runtime: Runtime) -> None:
    late, early = submit(runtime), submit(runtime)
    runtime.ledger.route(early, Decision(route=Route.LARGE_GEN, policy="t"), expected=State.QUEUED, rank=1.0)
    assert serve_one(runtime, LARGE)["served"] == early
    assert serve_one(runtime, LARGE)["served"] == late


def test_a_miss_is_published_with_its_vector(runtime: Runtime) -> None:
    request_id = submit(runtime, size="32x48", seed=5)
    record = served(runtime, request_id)
    assert record.state is State.DONE
    assert record.completion is not None
    assert (record.completion.width, record.completion.height, record.completion.seed) == (32, 48, 5)
    assert record.completion.bytes == len(runtime.store.read_bytes(record.completion.uri))
    vector = decode_vector(runtime.ledger.field(request_id, "ivec") or "")
    assert float(vector @ runtime.embedder.embed_texts(["a red fox"])[0]) == pytest.approx(1.0, abs=1e-5)
    assert record.step == 0 or record.step <= 50


def test_out_of_memory_is_freed_and_tried_once_more(runtime: Runtime) -> None:
    engine_of(runtime).draws = [OutOfMemoryError("no room")]
    assert served(runtime, submit(runtime)).state is State.DONE
    assert engine_of(runtime).freed == 1
    assert runtime.unwell is None


def test_a_request_that_is_too_big_ends_and_the_worker_stays_well(runtime: Runtime) -> None:
    request_id = submit(runtime)
    for attempt in range(1, runtime.settings.worker.max_attempts + 1):
        engine_of(runtime).draws = [OutOfMemoryError("no room")] * 2
        record = served(runtime, request_id)
        assert record.attempt == attempt
    assert record.state is State.FAILED
    assert runtime.unwell is None


def test_a_device_that_cannot_draw_at_all_is_unwell_until_it_can(runtime: Runtime) -> None:
    engine = engine_of(runtime)
    engine.draws, engine.ill = [OutOfMemoryError("no room")] * 2, OutOfMemoryError("not even one step")
    request_id = submit(runtime)
    out = serve_one(runtime, LARGE)
    assert out["waits_in"] == LARGE, "another worker needs a token for it"
    assert runtime.unwell == "not even one step"
    assert serve_one(runtime, LARGE)["outcome"] == UNWELL
    assert runtime.ledger.get(request_id).state is State.QUEUED
    engine.ill = None
    assert served(runtime, request_id).state is State.DONE
    assert runtime.unwell is None


def test_a_request_that_is_wrong_in_itself_is_not_tried_again(runtime: Runtime) -> None:
    engine_of(runtime).draws = [InvalidInputError("no such thing")]
    record = served(runtime, submit(runtime))
    assert (record.state, record.attempt, record.error) == (State.FAILED, 1, "no such thing")


def test_a_bug_is_reported_to_the_ledger_before_it_is_raised(runtime: Runtime) -> None:
    engine_of(runtime).draws = [ZeroDivisionError("a bug")]
    request_id = submit(runtime)
    with pytest.raises(ZeroDivisionError):
        serve_one(runtime, LARGE)
    record = runtime.ledger.get(request_id)
    assert record.state is State.QUEUED
    assert "a bug" in (record.error or "")


def test_an_interrupted_worker_gives_its_request_back_uncounted(runtime: Runtime) -> None:
    engine_of(runtime).draws = [SystemExit()]  # type: ignore[list-item]
    request_id = submit(runtime)
    with pytest.raises(SystemExit):
        serve_one(runtime, LARGE)
    assert runtime.ledger.get(request_id).state is State.QUEUED
    assert runtime.ledger.field(request_id, "tries") == "0"


@pytest.mark.parametrize(
    "trouble", [OutOfMemoryError("no room"), EngineError("broken"), UnavailableError("away"), SourceImageError("gone")]
)
def test_a_cancellation_that_crosses_an_error_ends_the_request(runtime: Runtime, trouble: Exception) -> None:
    """No token is sent, so nobody draws what nobody waits for."""
    request_id = submit(runtime)

    def cancelled(params: GenerateParams, start: int) -> Drawn:
        runtime.ledger.cancel(request_id)
        raise trouble

    engine_of(runtime)._run = cancelled  # type: ignore[method-assign]
    out = serve_one(runtime, LARGE)
    assert out["outcome"].endswith("cancelled")
    assert "waits_in" not in out
    assert runtime.ledger.get(request_id).state is State.CANCELLED


def test_a_cancellation_that_crosses_a_failed_verification_leaves_no_file(runtime: Runtime) -> None:
    source = served(runtime, submit(runtime)).completion
    assert source is not None
    hit = Decision(
        route=Route.SMALL_REFINE, policy="t", skipped_steps=10, source_id="s", source_uri=source.uri, verify_floor=0.9
    )  # fmt: skip
    runtime.ledger.set_control(verify_floor=1.5, escalation_rate=1.0)
    request_id = submit(runtime, hit)
    write = runtime.store.write

    def cancelled(*args: Any) -> Any:
        runtime.ledger.cancel(request_id)
        return write(*args)

    runtime.store.write = cancelled  # type: ignore[method-assign]
    assert serve_one(runtime, SMALL)["outcome"] == "cancelled"
    assert runtime.ledger.get(request_id).state is State.CANCELLED
    assert [file.uri for file in runtime.store.list()] == [source.uri]


def test_a_lost_lease_ends_the_run_and_leaves_no_file(runtime: Runtime) -> None:
    request_id = submit(runtime)
    running = runtime.ledger.redis
    key = f"{runtime.settings.redis_prefix}req:{request_id}"
    draw = engine_of(runtime)._run

    def stolen(params: GenerateParams, start: int) -> Drawn:
        running.hincrby(key, "attempt", 1)  # another attempt has taken it over meanwhile
        return draw(params, start)

    engine_of(runtime)._run = stolen  # type: ignore[method-assign]
    out = serve_one(runtime, LARGE)
    assert "lease lost" in out["outcome"]
    assert list(runtime.store.list()) == []
    assert runtime.ledger.get(request_id).state is State.RUNNING


def test_a_drawing_that_takes_too_long_is_stopped_at_a_step(runtime: Runtime) -> None:
    request_id = submit(runtime)
    record = runtime.ledger.claim(LARGE, "w", lease_s=5)
    assert record is not None
    with (
        Lease(runtime.ledger, request_id, record.attempt, lease_s=5, limit_s=0.0) as lease,
        pytest.raises(EngineError, match="task_time_limit_s"),
    ):
        lease.on_step(1, 50)


def test_the_small_model_draws_a_hit_from_its_source(runtime: Runtime) -> None:
    source = new_request_id()
    uri, _ = runtime.store.write(source, 1, Image.new("RGB", (48, 32), "blue"))
    hit = Decision(
        route=Route.SMALL_REFINE, policy="t", skipped_steps=15, source_id=source, source_uri=uri, source_depth=1
    )
    record = served(runtime, submit(runtime, hit), SMALL)
    assert record.completion is not None
    assert (record.completion.steps_run, record.completion.skipped_steps, record.completion.depth) == (35, 15, 2)
    assert (record.completion.width, record.completion.height) == (48, 32), "the source's own size"


def test_status_says_who_is_ready(runtime: Runtime) -> None:
    runtime.start()
    try:
        (status,) = runtime.ledger.workers()
        assert (status.worker, status.gpu, status.device) == ("gpu0@test", "0", "fake")
        assert status.models == ("scenes-large", "scenes-small")
        assert status.rss_mib > 1
    finally:
        runtime.stop()
    assert runtime.ledger.workers() == []


def test_overload_takes_steps_of_large_images_after_the_rungs(runtime: Runtime) -> None:
    """Degradation 1 lowers the hit threshold (the router's part); 2 draws large images in `slo.floor_steps` steps."""
    ran = []
    for level in (0, 1, 2):
        runtime.ledger.set_control(degradation=level)
        request_id = submit(runtime)
        serve_one(runtime, LARGE)
        done = runtime.ledger.get(request_id).completion
        assert done is not None
        ran.append(done.steps_run)
    assert ran == [50, 50, runtime.settings.slo.floor_steps]


def test_an_image_that_the_safety_hook_refuses_is_not_published(runtime: Runtime) -> None:
    runtime.safety_hook = lambda prompt, image: None if image is None else "too red"
    request_id = submit(runtime)
    serve_one(runtime, LARGE)
    record = runtime.ledger.get(request_id)
    assert record.state is State.FAILED
    assert "too red" in (record.error or "")
    assert list(runtime.store.list()) == []


def test_a_refined_image_below_the_floor_is_drawn_again_within_the_budget(runtime: Runtime) -> None:
    source = served(runtime, submit(runtime)).completion
    assert source is not None
    hit = Decision(
        route=Route.SMALL_REFINE, policy="t", skipped_steps=10, source_id="s", source_uri=source.uri, verify_floor=0.9,
        similarity=0.8, reason="hit: very like",
    )  # fmt: skip
    runtime.ledger.set_control(verify_floor=1.5, escalation_rate=1.0)
    request_id = submit(runtime, hit)
    queued = served(runtime, request_id, SMALL)
    assert queued.state is State.QUEUED
    assert queued.decision is not None
    assert queued.decision.similarity == hit.similarity
    assert f"below 1.5000; before that {hit.reason}, from s" in queued.decision.reason
    drawn = served(runtime, request_id, LARGE).completion
    assert drawn is not None
    assert drawn.escalated
    assert drawn.first_clip_score == pytest.approx(1.0, abs=1e-5)
    assert drawn.model == runtime.settings.large_model
    assert {f.uri for f in runtime.store.list()} == {source.uri, drawn.uri}, "the first drawing is dropped"
    runtime.ledger.set_control(escalation_rate=0.0)
    kept = served(runtime, submit(runtime, hit), SMALL).completion
    assert kept is not None
    assert (kept.model, kept.escalated) == (runtime.settings.small_model, False)


@pytest.mark.parametrize("how", ["failed", "died"])
def test_the_refined_image_is_the_answer_where_drawing_it_again_fails(runtime: Runtime, how: str) -> None:
    source = served(runtime, submit(runtime)).completion
    assert source is not None
    hit = Decision(
        route=Route.SMALL_REFINE, policy="t", skipped_steps=10, source_id="s", source_uri=source.uri, verify_floor=0.9
    )
    runtime.ledger.set_control(verify_floor=1.5, escalation_rate=1.0)
    request_id = submit(runtime, hit)
    assert served(runtime, request_id, SMALL).state is State.QUEUED
    for _ in range(runtime.settings.worker.max_attempts):
        if how == "failed":
            engine_of(runtime).draws = [EngineError("broken")]
            serve_one(runtime, LARGE)
        else:
            assert runtime.ledger.claim(LARGE, "w", lease_s=0.001) is not None
            wait_until(runtime.ledger.expire, 5, "the lease to expire")
    record = runtime.ledger.get(request_id)
    assert record.state is State.DONE
    assert record.completion is not None
    assert (record.completion.model, record.completion.skipped_steps) == (runtime.settings.small_model, 10)
    assert runtime.store.read(record.completion.uri).size == (64, 64)
    assert runtime.ledger.field(request_id, "ivec")
    assert runtime.ledger.index("unadmitted", newest_s=float("inf"))[-1] == request_id
    assert runtime.ledger.log(request_id)[-1][2].startswith("the refined image after all")
