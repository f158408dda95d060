"""Processes of the local stack: started in groups of their own, recognised later beyond doubt, ended politely.

A pid alone says nothing a minute later: the system may have given it to a stranger. So a process is noted with its
start time, and every one carries a mark in its environment that its children inherit; only what matches is signalled.
Without /proc (macOS) the start time comes from ps, and orphaned grandchildren are not found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

#: Not MODM_: a setting of that name does not exist, and unknown ones are errors.
MARK = "_MODM_STACK_ID"
PROC = Path("/proc")
#: Started by this very process. Popen complains when it is dropped before its program ended, and it alone should reap it.
_children: dict[int, subprocess.Popen[bytes]] = {}


class Noted(BaseModel):
    """What is written down of a started process, enough to know it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pid: int
    started: str
    command: tuple[str, ...]
    log: str


def start_time(pid: int) -> str | None:
    """When the process began, in a form that only serves to compare; None when there is none, or only its zombie."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"
    except FileNotFoundError:
        if PROC.joinpath("self").exists():
            return None
    except (OSError, IndexError):
        return None
    said = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, began = said.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else began.strip()


def _boot() -> str:
    with contextlib.suppress(OSError):
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()[:8]
    return ""


def alive(noted: Noted) -> bool:
    """Whether this very process still runs."""
    return start_time(noted.pid) == noted.started


def start(name: str, command: Sequence[str], *, environ: Mapping[str, str], log: Path, stack_id: str) -> Noted:
    """Start in a new session, so that a Ctrl-C at the terminal reaches only the one who asked."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**environ, MARK: stack_id},
            start_new_session=True,
        )
    _children[popen.pid] = popen
    began = start_time(popen.pid) or ""
    return Noted(name=name, pid=popen.pid, started=began, command=tuple(command), log=str(log))


def exit_status(noted: Noted) -> int | None:
    """How a process ended that this one started; None while it runs."""
    popen = _children.get(noted.pid)
    return popen.poll() if popen is not None else None


def marked(stack_id: str) -> list[int]:
    """Every process that carries the mark, children of dead parents included."""
    needle = f"{MARK}={stack_id}".encode()
    found = []
    for entry in PROC.glob("[0-9]*"):
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return [pid for pid in found if pid != os.getpid() and start_time(pid) is not None]


def stop(processes: Sequence[Noted], *, grace_s: float) -> list[str]:
    """TERM to each, KILL to what is left after the grace. Returns the names of those that had to be killed.

    TERM goes to the first process only: a Celery worker then lets its child finish what it is drawing.
    """
    running = [p for p in processes if alive(p)]
    for noted in running:
        _signal(noted.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (running := [p for p in running if alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.03)
    for noted in running:
        _signal(noted.pid, signal.SIGKILL)
    for noted in processes:
        wait_gone(noted)
    return [p.name for p in running]


def kill_marked(stack_id: str, *, timeout_s: float = 5.0) -> int:
    """KILL all that carry the mark, for what a crash left. Returns how many there were."""
    first = left = marked(stack_id)
    deadline = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline:
        for pid in left:
            _signal(pid, signal.SIGKILL)
            _reap(pid)
        time.sleep(0.02)
        left = marked(stack_id)
    for pid in list(_children):
        _reap(pid)
    return len(first)


def wait_gone(noted: Noted, *, timeout_s: float = 5.0) -> None:
    """A killed process is gone when the system says so, a moment after the signal."""
    deadline = time.monotonic() + timeout_s
    while alive(noted) and time.monotonic() < deadline:
        time.sleep(0.02)
    _reap(noted.pid)


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _reap(pid: int) -> None:
    """A child of ours would stay a zombie; another's child is not ours to wait for."""
    if (popen := _children.get(pid)) is not None and popen.poll() is not None:
        del _children[pid]


def port_holder(port: int) -> str:
    """Who listens on a TCP port, as well as this user may know: ``pid 123 (name)``, or an empty string."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for entry in PROC.glob("[0-9]*") if inodes else ():
        with contextlib.suppress(OSError):
            if any(os.readlink(fd) in inodes for fd in (entry / "fd").iterdir()):
                return f"pid {entry.name} ({(entry / 'comm').read_text().strip()})"
    return ""


def family(pid: int) -> list[int]:
    """Ids of the children of a process, and of theirs (Linux only)."""
    children = [int(c) for file in PROC.glob(f"{pid}/task/*/children") for c in file.read_text().split()]
    return [*children, *(g for child in children for g in family(child))]
