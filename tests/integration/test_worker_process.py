"""Real Celery workers (prefork, spawn) with the fake engine, on a real Redis."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from PIL import Image

from modm_tasks.app import make_app
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest, WorkerStatus, new_request_id
from modm_tasks.queues import TASK_OF_QUEUE
from modm_tasks.settings import Settings, WorkerSettings, load_settings
from ops.redis_server import RunningRedis
from tests.conftest import child_environment, fresh_database
from tests.support.processes import Process, Processes, processes, wait_until
from workers.testing import PROMPT_KEY

NODE = f"gpu0@{socket.gethostname()}"


@dataclass
class Rig:
    """A worker of its own Redis database, and what a test needs to talk to it."""

    settings: Settings
    ledger: Ledger
    store: ImageStore
    app: Celery
    procs: Processes

    def worker(self, **environ: str) -> Process:
        """As a user would start it by hand."""
        argv = [sys.executable, "-m", "celery", "-A", "modm_tasks.app", "worker", "-n", "gpu0@%h"]
        return self.procs.start([*argv, "-Q", "large-gen,small-refine"], name="worker", env=environ)

    def submit(self, prompt: str, decision: Decision | None = None, **request: Any) -> str:
        request_id = new_request_id()
        decision = decision or Decision(route=Route.LARGE_GEN, policy="test")
        self.ledger.accept(request_id, SubmitRequest(prompt=prompt, **request))
        assert self.ledger.route(request_id, decision)
        queue = decision.route.value
        self.app.send_task(TASK_OF_QUEUE[queue], args=[request_id, 0, 0.0], queue=queue)
        return request_id

    def hit(self, k: int, *, uri: str | None = None) -> Decision:
        source = new_request_id()
        if uri is None:
            uri, _ = self.store.write(source, 1, Image.new("RGB", (64, 64), "red"))
        return Decision(route=Route.SMALL_REFINE, policy="test", skipped_steps=k, source_id=source, source_uri=uri)

    def ready(self, *, other_than: int = 0) -> WorkerStatus:
        def found() -> WorkerStatus | None:
            assert any(process.alive for process in self.procs.running), f"no process is left\n{self.procs.logs()}"
            return next((w for w in self.ledger.workers() if w.pid != other_than), None)

        status = wait_until(found, 120, f"a ready worker\n{self.procs.logs()}")
        assert status is not None
        return status

    def ended(self, request_id: str) -> RequestRecord:
        def over() -> RequestRecord | None:
            record = self.ledger.get(request_id)
            return record if record.state in {State.DONE, State.FAILED, State.CANCELLED} else None

        record = wait_until(over, 40, f"the end of {request_id}")
        assert record is not None
        return record


@contextmanager
def rigged(server: RunningRedis, home: Path, **worker: Any) -> Iterator[Rig]:
    url = fresh_database(server)
    chosen = WorkerSettings(engine="fake", lease_s=2.0, **worker)
    settings = load_settings(redis_url=url, home=home, embedder="fake", worker=chosen)
    environ = child_environment(url, home) | {"MODM_EMBEDDER": "fake", "MODM_WORKER__LEASE_S": "2"}
    environ |= {f"MODM_WORKER__{name.upper()}": str(value) for name, value in worker.items()}
    home.mkdir(parents=True, exist_ok=True)
    ledger = Ledger.from_settings(settings)
    with processes(home / "logs", environ) as group, make_app(settings) as app:
        yield Rig(settings, ledger, ImageStore(settings.image_root), app, group)
    ledger.redis.close()


@pytest.fixture(scope="module")
def quick(redis_server: RunningRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rigged(redis_server, tmp_path_factory.mktemp("quick"), fake_large_s=0.2, fake_small_s=0.1) as rig:
        rig.worker()
        rig.ready()
        yield rig


def test_a_plain_celery_worker_serves_both_routes(quick: Rig) -> None:
    status = quick.ready()
    assert (status.gpu, status.worker, status.unwell) == ("0", NODE, None)
    assert set(status.models) == {"scenes-large", "scenes-small"}

    first = quick.ended(quick.submit("a red fox", seed=3))
    assert first.state is State.DONE, first.error
    assert first.completion is not None
    assert (first.completion.model, first.completion.steps_run, first.completion.depth) == ("scenes-large", 50, 0)
    assert quick.store.read(first.completion.uri).info[PROMPT_KEY] == "a red fox"

    second = quick.ended(quick.submit("a blue fox", quick.hit(30, uri=first.completion.uri)))
    assert second.completion is not None
    assert (second.completion.model, second.completion.steps_run) == ("scenes-small", 20)
    assert (second.completion.skipped_steps, second.completion.depth) == (30, 1)
    assert second.completion.embedder == status.embedder


def test_a_broken_request_fails_after_its_attempts(quick: Rig) -> None:
    broken = quick.ended(quick.submit("please [[fail]]"))
    assert broken.state is State.FAILED
    assert "[[fail]]" in (broken.error or "")
    assert broken.attempt == quick.settings.worker.max_attempts


def test_a_hit_whose_source_is_gone_or_garbage_is_drawn_by_the_large_model(quick: Rig) -> None:
    garbage = quick.store.write_atomic(quick.store.path_for(new_request_id(), 1), b"\x89PNG no more")
    for uri in (quick.store.path_for(new_request_id(), 1), garbage):
        record = quick.ended(quick.submit("a green fox", quick.hit(5, uri=uri)))
        assert record.state is State.DONE
        assert record.completion is not None
        assert (record.completion.model, record.completion.skipped_steps) == ("scenes-large", 0)


def test_a_refined_image_below_the_floor_is_drawn_again_by_the_large_model(quick: Rig) -> None:
    quick.ledger.set_control(verify_floor=1.5)  # no cosine reaches it
    try:
        hit = quick.hit(10).model_copy(update={"verify_floor": 0.9})
        record = quick.ended(quick.submit("a proud fox", hit))
    finally:
        quick.ledger.set_control(verify_floor=None)
    assert record.completion is not None
    assert record.completion.escalated
    assert record.completion.model == "scenes-large"
    assert record.completion.first_clip_score == pytest.approx(1.0, abs=1e-4)


def test_cancelling_and_crashing(redis_server: RunningRedis, tmp_path: Path) -> None:
    """A cancelled request stops at a step and leaves no file; a killed child is replaced, its request taken back."""
    with rigged(redis_server, tmp_path, fake_large_s=20, fake_small_s=0.1) as rig:
        rig.worker()
        pid = rig.ready().pid
        slow = rig.submit("a slow fox")
        wait_until(lambda: rig.ledger.get(slow).step > 0, 20, "a first step")
        assert rig.ledger.cancel(slow) is State.RUNNING
        asked = time.monotonic()
        assert rig.ended(slow).state is State.CANCELLED
        assert time.monotonic() - asked < 5
        assert list(rig.store.list()) == []

        poison = rig.submit("a fox that [[crash]]es the driver")
        expired: Callable[[], list[tuple[str, State, str]]] = rig.ledger.expire
        assert wait_until(expired, 30, "the lease to run out") == [(poison, State.QUEUED, "large-gen")]
        assert rig.ready(other_than=pid).pid != pid
        small = Decision(route=Route.SMALL_REFINE, policy="small-only")
        assert rig.ended(rig.submit("a healthy fox", small)).state is State.DONE


def test_a_worker_that_cannot_start_says_why_once_and_exits(redis_server: RunningRedis, tmp_path: Path) -> None:
    with rigged(redis_server, tmp_path) as rig:
        worker = rig.worker(MODM_WORKER__ENGINE="diffusers", MODM_LARGE_MODEL="no-such-model")
        assert worker.popen.wait(60) == 2
        lines = [line for line in worker.output().splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert "no-such-model" in lines[0]
        assert "Traceback" not in worker.output()
        assert rig.ledger.workers() == []
