"""Start, recognise and end processes: never a stranger, never a left-over."""

from __future__ import annotations

import os
import signal
import socket
import sys
import uuid
from pathlib import Path

import pytest

from modm_tasks.errors import UnavailableError
from ops import processes, stack
from ops.processes import Noted
from tests.support.processes import wait_until

SLEEP = (sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()")
STUBBORN = (
    *(sys.executable, "-c"),
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()",
)
PARENT = (
    *(sys.executable, "-c"),
    "import subprocess, sys, signal\n"
    "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], start_new_session=True)\n"
    "print('up', flush=True); signal.pause()",
)


def launch(command: tuple[str, ...], tmp_path: Path) -> tuple[Noted, str]:
    stack_id = uuid.uuid4().hex
    log = tmp_path / f"{stack_id}.log"
    noted = processes.start("one", command, environ=os.environ, log=log, stack_id=stack_id)
    wait_until(lambda: "up" in log.read_text(), 10, "the process to run")
    return noted, stack_id


def test_stop_asks_politely(tmp_path: Path) -> None:
    noted, stack_id = launch(SLEEP, tmp_path)
    assert processes.alive(noted)
    assert processes.stop([noted], grace_s=10) == []
    assert not processes.alive(noted)
    assert processes.marked(stack_id) == []


def test_stubborn_is_killed_after_the_grace(tmp_path: Path) -> None:
    noted, _ = launch(STUBBORN, tmp_path)
    assert processes.stop([noted], grace_s=0.2) == ["one"]
    assert not processes.alive(noted)


def test_a_stranger_with_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    noted, stack_id = launch(SLEEP, tmp_path)
    stranger = noted.model_copy(update={"started": "long-ago:1"})
    assert not processes.alive(stranger)
    assert processes.stop([stranger], grace_s=0) == []
    assert processes.alive(noted)
    processes.kill_marked(stack_id)


def test_orphans_of_a_killed_parent_are_found_by_their_mark(tmp_path: Path) -> None:
    noted, stack_id = launch(PARENT, tmp_path)
    assert len(processes.marked(stack_id)) == 2
    os.kill(noted.pid, signal.SIGKILL)
    processes.wait_gone(noted)
    assert processes.kill_marked(stack_id) == 1
    assert processes.marked(stack_id) == []


def test_port_in_use_names_port_and_holder() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"port {port} on 127.0.0.1: .*pid {os.getpid()} ") as caught:
            stack.check_port("127.0.0.1", port)
        assert stack.choose_port(port) != port
    assert caught.value.exit_code == 3
    stack.check_port("127.0.0.1", port)


def test_damaged_state_is_not_ignored(tmp_path: Path) -> None:
    assert stack.read_state(tmp_path) is None
    stack.state_path(tmp_path).write_text("{")
    with pytest.raises(stack.ModmError, match="cannot be read"):
        stack.read_state(tmp_path)


def test_two_ups_do_not_meet(tmp_path: Path) -> None:
    with stack.locked(tmp_path), pytest.raises(UnavailableError, match="another `modm up`"), stack.locked(tmp_path):
        pass


def test_down_of_nothing_is_fine(tmp_path: Path) -> None:
    assert stack.down(tmp_path / "none", grace_s=1, say=print) is False
    assert not (tmp_path / "none").exists()
