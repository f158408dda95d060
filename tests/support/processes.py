"""Real processes in tests: started in their own group, read through a log file, always ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float, what: str, *, poll_s: float = 0.03) -> T:
    """The first true value of ``condition``. Fails with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for: {what}")
        pause.wait(poll_s)
    return value


@dataclass
class Process:
    """One running program with its log."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.output().splitlines()[-lines:])

    def signal(self, signum: int) -> None:
        """To the whole group; gone already is fine."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signum)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.popen.wait()

    def stop(self, *, timeout_s: float = 10.0) -> int:
        """TERM, then KILL. Returns the exit status of the first process; no member of the group is left."""
        if self.alive:
            self.popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout_s)
        self.kill()
        return self.popen.returncode


@dataclass
class Processes:
    """Starts programs and ends them all at the end of the test, whatever happened in between."""

    directory: Path
    environ: Mapping[str, str]
    running: list[Process] = field(default_factory=list)

    def start(
        self, command: Sequence[str], *, name: str = "", env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> Process:
        """``env`` is added to the environment of this object."""
        name = name or Path(command[0]).name
        log = self.directory / f"{len(self.running):02d}-{name}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**self.environ, **(env or {})},
                start_new_session=True,
            )
        process = Process(name, popen, log)
        self.running.append(process)
        return process

    def modm(self, *args: str, name: str = "", env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
        """``modm ARGS``, from this interpreter."""
        return self.start([*MODM, *args], name=name or args[0], env=env, cwd=cwd)

    def logs(self, lines: int = 30) -> str:
        return "\n".join(f"--- {p.name} ({p.log})\n{p.tail(lines)}" for p in self.running)

    def close(self) -> None:
        for process in reversed(self.running):
            process.kill()


MODM = (sys.executable, "-m", "orchestrator.cli")


@contextmanager
def processes(directory: Path, environ: Mapping[str, str]) -> Iterator[Processes]:
    """All processes of the block; none survives it."""
    directory.mkdir(parents=True, exist_ok=True)
    group = Processes(directory, environ)
    try:
        yield group
    finally:
        group.close()


def run_modm(
    *args: str, env: Mapping[str, str], cwd: Path = ROOT, timeout_s: float = 60.0, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """``modm ARGS`` to its end, with its output as text."""
    return subprocess.run(
        [*MODM, *args],
        env=dict(env),
        cwd=cwd,
        timeout=timeout_s,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
