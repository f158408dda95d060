"""Routes and commands of workers and controller, over real HTTP, on a real Redis."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner

from modm_tasks.client import Client
from modm_tasks.cluster import Control, RoleMove
from modm_tasks.errors import ConflictError, InvalidInputError, ModmError, NotFoundError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import WorkerStatus
from modm_tasks.settings import Settings
from orchestrator.cli_controller import controller_app, workers_app
from orchestrator.controller import roles
from orchestrator.controller.decide import Decider
from orchestrator.controller.history import explain, ticks
from orchestrator.controller.http import build_router
from orchestrator.controller.members import Members
from orchestrator.controller.metrics import Metrics
from orchestrator.controller.rules import Rules
from orchestrator.replies import add_error_handlers
from tests.conftest import SettingsFactory
from tests.support.processes import wait_until


def status(name: str, *, busy_with: str | None = None) -> WorkerStatus:
    return WorkerStatus(
        worker=name, gpu="0", host="h", pid=1, device="fake", models=("l", "s"), large_model="l", small_model="s",
        embedder="fake", busy_with=busy_with, started_s=0.0,
    )  # fmt: skip


@pytest.fixture
def ledger(settings: SettingsFactory) -> Ledger:
    ledger = Ledger.from_settings(settings())
    ledger.worker_ready(status("gpu0@h", busy_with="some-request"), 60)
    ledger.worker_ready(status("gpu1@h"), 60)
    return ledger


def applied(ledger: Ledger, worker: str) -> None:
    """As the reconciler notes it."""
    wanted = ledger.desired_roles()[worker]
    role = None if wanted.drained else wanted.role
    roles.set_applied(ledger, worker, roles.Applied(role=role, mode="roles", epoch=wanted.epoch, at_s=ledger.now_s()))


@pytest.fixture
def url(ledger: Ledger) -> Iterator[str]:
    app = FastAPI()
    add_error_handlers(app)
    app.include_router(build_router(lambda: ledger))
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        wait_until(lambda: server.started, 15, "the server to start")
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def decide(ledger: Ledger, settings: Settings, **control: object) -> Decider:
    decider = Decider(settings, ledger, Metrics())
    decider.load()
    rules = Rules.of(settings, ledger.set_control(**control) if control else ledger.control())
    names = tuple(w.worker for w in ledger.workers())
    decider.decide(rules, Members(here=names), ledger.workers(), ledger.desired_roles(), why="period")
    return decider


def test_workers_are_listed_assigned_drained_and_resumed(client: Client, ledger: Ledger) -> None:
    rows = client.get("/v1/workers")
    assert [(r["worker"], r["role"], r["ready"], r["settled"]) for r in rows] == [
        ("gpu0@h", None, True, False),
        ("gpu1@h", None, True, False),
    ]
    assert client.post("/v1/workers/gpu0@h/role", {"role": "large"})["pinned"] is True
    applied(ledger, "gpu0@h")
    (row, _) = client.get("/v1/workers")
    assert (row["role"], row["in_force"], row["settled"], row["busy_with"]) == ("large", "large", True, "some-request")
    assert client.post("/v1/workers/gpu0@h/drain")["drained"] is True
    assert client.get("/v1/workers")[0]["settled"] is False  # until the reconciler has seen it
    with pytest.raises(ConflictError, match="drained already"):
        client.post("/v1/workers/gpu0@h/drain")
    resumed = client.post("/v1/workers/gpu0@h/resume")
    assert (resumed["role"], resumed["pinned"], resumed["drained"]) == ("large", True, False)
    assert client.post("/v1/workers/gpu0@h/role", {"role": "auto"})["pinned"] is False
    with pytest.raises(NotFoundError, match="no worker gpu9@h; known: gpu0@h, gpu1@h"):
        client.post("/v1/workers/gpu9@h/drain")
    with pytest.raises(InvalidInputError):
        client.post("/v1/workers/gpu0@h/role", {"role": "medium"})


def test_control_is_changed_field_by_field(client: Client, ledger: Ledger) -> None:
    client.put("/v1/control", {"allocation": "slo", "period_s": 2.5})
    assert client.put("/v1/control", {"mode": "pooled"})["allocation"] == "slo"
    assert client.put("/v1/control", {"period_s": None})["period_s"] is None
    assert ledger.control() == Control(mode="pooled", allocation="slo")
    for body, word in (
        ({"allocation": "best"}, "allocation"),
        ({"degradation": None}, "degradation"),
        ({"speed": 2}, "speed"),
    ):
        with pytest.raises(InvalidInputError, match=word):
            client.put("/v1/control", body)
    assert ledger.control() == Control(mode="pooled", allocation="slo")


def test_moves_tell_how_long_they_took(client: Client, ledger: Ledger) -> None:
    for at, epoch in ((100.0, 1), (200.0, 2)):
        move = RoleMove(at_s=at, worker="gpu0@h", old="small", new="large", epoch=epoch, reason="r")
        ledger.record_move(move)
        if epoch == 2:
            roles.note_time(ledger, move, took_s=0.04)
    assert [m["took_s"] for m in client.get("/v1/role_moves")] == [None, 0.04]
    assert [m["epoch"] for m in client.get("/v1/role_moves", since_s=150)] == [2]


def test_an_operators_word_is_not_overwritten(ledger: Ledger) -> None:
    seen = ledger.desired_roles().get("gpu0@h")
    assert seen is None
    roles.drain(ledger, "gpu0@h")  # between the controller's reading and its writing
    assert roles.decide(ledger, "gpu0@h", "large", reason="late", seen_epoch=0) is None
    assert ledger.desired_roles()["gpu0@h"].drained


def test_decisions_continue_after_a_restart_and_are_explained(ledger: Ledger, settings: SettingsFactory) -> None:
    made = settings(controller={"allocation": "modm-throughput", "period_s": 3600, "history": 2})
    ledger.redis.hset("modm:step_s", mapping={made.large_model: 0.1, made.small_model: 0.02})
    first = decide(ledger, made)
    assert {n: r.role for n, r in ledger.desired_roles().items()} == {"gpu0@h": "large", "gpu1@h": "large"}
    assert not first.due(Rules.of(made, ledger.control()))
    second = Decider(made, ledger, Metrics())
    second.load()
    assert second._state == first._state  # the PID goes on where it was, and so does the period
    assert not second.due(Rules.of(made, ledger.control()))
    assert second.due(Rules.of(made, Control.model_validate({"period_s": 1e-6})))
    for _ in range(3):
        decide(ledger, made)
    assert len(ticks(ledger, last=100)) == 2  # capped
    answer = explain(ledger, last=1)
    assert answer["counts"]["decisions"] == 4
    (tick,) = answer["ticks"]
    assert (tick["allocation"], tick["n"], tick["n_large"]) == ("modm-throughput", 2, 2)
    assert tick["inputs"]["large_s"] == 5.0


def test_pinned_workers_keep_their_role_and_count(ledger: Ledger, settings: SettingsFactory) -> None:
    made = settings(controller={"allocation": "static", "static_large": 1})
    roles.assign(ledger, "gpu1@h", "large")
    decide(ledger, made)
    assert {n: r.role for n, r in ledger.desired_roles().items()} == {"gpu0@h": "small", "gpu1@h": "large"}
    decide(ledger, made, static_large=2)
    assert {n: r.role for n, r in ledger.desired_roles().items()} == {"gpu0@h": "large", "gpu1@h": "large"}


def test_overload_degrades_refuses_and_takes_both_back(ledger: Ledger, settings: SettingsFactory) -> None:
    made = settings(
        controller={"allocation": "slo", "period_s": 1},
        slo={"degrade": True, "floor_threshold_rungs": 1, "floor_steps": 50},
    )
    ledger.redis.hset("modm:step_s", mapping={made.large_model: 0.1, made.small_model: 0.02})
    bucket = int(ledger.now_s() // 10)
    ledger.redis.hset(f"modm:win:{bucket}", mapping={"arrivals": 500, "misses": 500, "k:0": 500})
    decide(ledger, made)
    assert ledger.control().degradation == 1
    assert ledger.control().refuse_until_s == 0.0
    waiting = {f"r{i}": float(i) for i in range(50)}  # 50 large images of 5 s for two workers
    for name in waiting:
        ledger.redis.hset(f"modm:req:{name}", mapping={"request": "{}", "decision": "{}", "arrival_s": ledger.now_s()})
    ledger.redis.zadd("modm:ready:large-gen", waiting)
    decide(ledger, made)
    wait_s = ledger.control().refuse_until_s - ledger.now_s()
    # 125 s of work for each of two workers, 5 s of its own, 10 s of SLO: 120 s late.
    assert wait_s == pytest.approx(120, abs=2)
    decide(ledger, made, allocation="static")
    assert (ledger.control().degradation, ledger.control().refuse_until_s) == (0, 0.0)


def test_the_commands_show_and_change(
    url: str, ledger: Ledger, settings: SettingsFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODM_URL", url)
    run = CliRunner()
    assert run.invoke(workers_app, ["assign", "gpu0@h", "large"]).exit_code == 0
    applied(ledger, "gpu0@h")
    shown = run.invoke(workers_app, ["list"])
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[1].split() == ["gpu0@h", "large", "yes", "busy", "fake", "some-request"]
    assert run.invoke(workers_app, ["drain", "gpu0@h"]).exit_code == 0
    rows = json.loads(run.invoke(workers_app, ["list", "--json"]).stdout)
    assert rows[0]["drained"] is True
    assert run.invoke(workers_app, ["resume", "gpu0@h"]).exit_code == 0
    bad = run.invoke(workers_app, ["assign", "gpu0@h", "huge"])
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert "role must be large, small or auto" in bad.stderr
    missing = run.invoke(workers_app, ["drain", "nobody"])
    assert missing.exit_code == 1
    assert "no worker nobody" in missing.stderr
    decide(ledger, settings(controller={"allocation": "static"}))
    words = run.invoke(controller_app, ["explain"]).stdout
    assert "static: 1 of 2 large (period)" in words
    assert json.loads(run.invoke(controller_app, ["explain", "--json", "--last", "1"]).stdout)["ticks"][0]["n"] == 2


def test_commands_say_what_is_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = CliRunner()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    monkeypatch.setenv("MODM_URL", f"http://127.0.0.1:{port}")
    listed = run.invoke(workers_app, ["list"])
    assert listed.exit_code == 3
    assert len(listed.stderr.strip().splitlines()) == 1
    bad = run.invoke(controller_app, ["run", "--allocation", "best"])
    assert bad.exit_code == 2
    assert "static, modm-quality, modm-throughput, slo" in bad.stderr


def test_metrics_endpoint_tells_roles_and_moves(settings: SettingsFactory, ledger: Ledger) -> None:
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    made = settings(controller={"metrics_port": port, "allocation": "static"})
    metrics = Metrics()
    close = metrics.serve(made)
    try:
        roles.drain(ledger, "gpu1@h")
        metrics.workers(ledger.desired_roles(), {"gpu1@h"}, set())
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert 'modm_workers{role="small",state="drained"} 1.0' in text
        assert "modm_role_moves_total 0.0" in text
        with pytest.raises(ModmError, match=f"metrics_port {port}"):
            Metrics().serve(made)
    finally:
        close()


def test_a_silent_start_is_within_the_period(ledger: Ledger, settings: SettingsFactory) -> None:
    """``decided_s`` is kept by the Redis clock, so a restart neither skips a period nor decides twice in one."""
    made = settings(controller={"allocation": "static", "period_s": 3600})
    decide(ledger, made)
    kept = ledger.document("controller")
    assert kept is not None
    assert kept["decided_s"] == pytest.approx(time.time(), abs=30)
