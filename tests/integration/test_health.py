"""`python -m ops.health`, as the containers ask it, against a real worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from modm_tasks.cluster import DesiredRole
from modm_tasks.queues import TASK_OF_QUEUE
from ops.health import main, worker_problem
from ops.redis_server import RunningRedis
from tests.integration.test_worker_process import NODE, rigged
from tests.support.processes import wait_until


def test_a_worker_is_well_when_its_child_is_ready_and_a_role_queue_is_consumed(
    redis_server: RunningRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with rigged(redis_server, tmp_path) as rig:
        assert rig.settings.redis_url is not None
        monkeypatch.setenv("MODM_REDIS_URL", rig.settings.redis_url.get_secret_value())

        def says(text: str) -> bool:
            return text in (worker_problem("gpu0@%h") or "well")

        assert says("has not said that it is ready")
        rig.worker()
        rig.ready()
        wait_until(lambda: says("well"), 20, "a healthy worker")
        assert main(["worker", NODE]) == 0

        for queue in TASK_OF_QUEUE:  # as after a reconnect that lost them: its parent still answers pings
            rig.app.control.cancel_consumer(queue, destination=[NODE], reply=True)
        wait_until(lambda: says("consumes no role queue"), 10, "the queues to be gone")
        assert rig.app.control.ping(destination=[NODE], timeout=5) != []
        assert main(["worker", NODE]) == 1
        assert "consumes no role queue" in capsys.readouterr().err

        rig.ledger.set_desired_role(NODE, DesiredRole(role="small", drained=True))
        assert says("well"), "drained on purpose"


def test_a_url_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["url", "http://127.0.0.1:9/healthz"]) == 1
    assert capsys.readouterr().err.splitlines() == ["http://127.0.0.1:9/healthz: ConnectError"]
