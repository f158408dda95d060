"""`modm up` and `modm down` as a user runs them, with the fake engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from ops import processes, stack
from tests.support.processes import Processes, run_modm, wait_until


@pytest.fixture
def env(environ: dict[str, str], tmp_path: Path) -> Any:
    """The bundled Redis of the stack itself, on free ports. Whatever a failing test leaves is ended."""
    del environ["MODM_REDIS_URL"]  # the dict that `procs` starts its processes with, too
    yield environ | {"MODM_EMBEDDER": "fake", "MODM_API__PORT": "0"}
    stack.down(tmp_path / "home", grace_s=1, say=print)


def state_of(home: Path) -> stack.StackState:
    state = stack.read_state(home)
    assert state is not None
    return state


@pytest.mark.slow
def test_life_of_a_stack(env: dict[str, str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = run_modm("up", "--workers", "2", "--mode", "pooled", "--json", env=env, timeout_s=120)
    assert done.returncode == 0, done.stderr
    said, state = json.loads(done.stdout), state_of(home)
    names = ["redis", "orchestrator", "worker0", "worker1", "controller", "flower"]
    assert list(said["processes"]) == names == [p.name for p in state.processes]
    assert "worker1 ready" in done.stderr
    assert stat.S_IMODE(stack.state_path(home).stat().st_mode) == 0o600
    assert all(Path(p.log).is_file() for p in state.processes)
    password = (home / "redis/password").read_text()
    assert password not in done.stdout + done.stderr
    assert all(password not in " ".join(p.command) for p in state.processes)

    answer = httpx.post(
        f"{state.url}/v1/images/generations", json={"prompt": "a red circle"}, timeout=30, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]

    flower_is_read_only(str(state.flower_url))

    again = run_modm("up", env=env)
    assert again.returncode == 3
    assert "already up" in again.stderr

    os.kill(said["processes"]["orchestrator"], signal.SIGKILL)
    os.kill(said["processes"]["worker1"], signal.SIGKILL)
    wait_until(lambda: set(stack.died(state)) == {"orchestrator", "worker1"}, 10, "both to be gone")
    doctor = run_modm("doctor", "--json", env=env)
    assert doctor.returncode == 1
    finding = next(c for c in json.loads(doctor.stdout) if not c["ok"])
    assert (finding["name"], finding["mend"]) == ("stack", "modm down && modm up")

    down = run_modm("down", env=env)
    assert (down.returncode, down.stdout) == (0, "stopped\n"), down.stderr
    assert processes.marked(state.stack_id) == []
    assert not stack.state_path(home).exists()
    again = run_modm("down", env=env)
    assert (again.returncode, again.stdout) == (0, "nothing is running\n")


def flower_is_read_only(url: str) -> None:
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:

        def serves() -> bool:
            try:
                return client.get("/healthcheck").is_success
            except httpx.TransportError:
                return False

        wait_until(serves, 30, "Flower to answer")
        assert client.get("/api/workers").status_code == 401
        assert client.post("/api/worker/shutdown/gpu0@anywhere").status_code in {401, 403}


def test_port_in_use(env: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        done = run_modm("up", env=env | {"MODM_API__PORT": str(port)})
    assert done.returncode == 3
    assert f"port {port}" in done.stderr
    assert f"pid {os.getpid()}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert stack.read_state(tmp_path / "home") is None


def test_redis_away(env: dict[str, str]) -> None:
    done = run_modm("up", env=env | {"MODM_REDIS_URL": "redis://127.0.0.1:1/0"})
    assert done.returncode == 3
    assert done.stderr.startswith("error: the Redis of MODM_REDIS_URL does not answer")


def test_a_part_that_dies_is_told_and_nothing_is_left(env: dict[str, str], tmp_path: Path) -> None:
    done = run_modm("up", "--workers", "1", "--no-flower", env=env | {"MODM_QDRANT_URL": "nonsense:"}, timeout_s=90)
    assert done.returncode != 0
    assert "orchestrator ended with status" in done.stderr
    assert "qdrant" in done.stderr.lower(), "the end of its log says why"
    assert stack.read_state(tmp_path / "home") is None


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_start_leaves_nothing(
    env: dict[str, str], tmp_path: Path, procs: Processes, signum: signal.Signals
) -> None:
    home = tmp_path / "home"
    up = procs.modm("up", "--workers", "1", "--no-flower", env=env, name="up")
    noted: list[str] = []

    def orchestrator_started() -> bool:
        state = stack.read_state(home)
        noted[:] = [state.stack_id] if state else []
        return state is not None and any(p.name == "orchestrator" for p in state.processes)

    wait_until(orchestrator_started, 30, "the start to be half way")
    os.kill(up.pid, signum)
    try:
        assert up.popen.wait(30) == 130, up.output()
    except subprocess.TimeoutExpired:
        pytest.fail(f"modm up went on: {up.output()}")
    assert processes.marked(noted[0]) == []
    assert stack.read_state(home) is None
