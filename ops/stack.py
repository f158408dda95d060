"""The whole system on one machine: `modm up` and `modm down`.

Each process is its own group with its own log; ``MODM_HOME/stack.json`` (0600, it holds the Redis password) says what
runs, so that `modm down` works from another terminal and after a crash. Start-up is all or nothing: what was started is
ended again when one part fails or the user interrupts.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from modm_tasks.errors import ModmError, UnavailableError
from modm_tasks.settings import Settings
from ops import processes
from ops.processes import Noted
from ops.redis_server import free_port, ping, plan_redis, write_private

Say = Callable[[str], None]

MODM = (sys.executable, "-m", "orchestrator.cli")
#: What is ended together, in this order; a name belongs to the first tier whose word it starts with.
TIERS = (("flower",), ("worker",), ("controller", "orchestrator"), ("redis",))
#: Large models load for minutes; a process that dies is noticed at once, so patience costs nothing.
READY_S = 900.0
TELL_EVERY_S = 15.0


class UpOptions(BaseModel):
    """What `modm up` was asked for. ``workers`` None = one for each GPU, or two where there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int | None = Field(None, ge=0, le=64)
    flower: bool = True
    mode: str | None = None
    extra_environ: dict[str, str] = {}
    ready_timeout_s: float = READY_S


class StackState(BaseModel):
    """``stack.json``. ``url`` and ``redis_url`` are read by every client and by further workers of this machine."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = 1
    stack_id: str
    url: str
    redis_url: str
    flower_url: str | None = None
    started_s: float
    processes: tuple[Noted, ...] = ()


def state_path(home: Path) -> Path:
    return home / "stack.json"


def read_state(home: Path) -> StackState | None:
    """None when nothing is noted. A damaged file is an error: processes may run that it named."""
    try:
        return StackState.model_validate_json(state_path(home).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ModmError(f"{state_path(home)} cannot be read; end its processes and remove it") from error


def gpu_count() -> int:
    """GPUs by their device files, without loading torch."""
    nvidia = [p for p in glob.glob("/dev/nvidia[0-9]*") if p.removeprefix("/dev/nvidia").isdigit()]
    amd = 0
    for path in glob.glob("/sys/class/kfd/kfd/topology/nodes/*/gpu_id"):
        with contextlib.suppress(OSError):
            amd += Path(path).read_text().strip() not in {"", "0"}
    return len(nvidia) or amd


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time for a MODM_HOME. Raises UnavailableError at once when another is at work."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "stack.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UnavailableError(f"another `modm up` or `modm down` is at work on {home}") from None
        yield


class Starter:
    """Starts one stack, noting each process before the next."""

    def __init__(self, settings: Settings, options: UpOptions, say: Say) -> None:
        self.settings, self.options, self.say = settings, options, say
        self.home = settings.home.absolute()
        self.began = time.monotonic()
        self.environ = dict(os.environ) | options.extra_environ | {"MODM_HOME": str(self.home)}
        if options.mode:
            self.environ["MODM_WORKER__MODE"] = options.mode
        self.state = StackState(stack_id=uuid.uuid4().hex, url="", redis_url="", started_s=time.time())

    def note(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        write_private(state_path(self.home), self.state.model_dump_json(indent=2) + "\n")

    def launch(self, name: str, *command: str, environ: dict[str, str] | None = None) -> None:
        noted = processes.start(
            name,
            command,
            environ=self.environ | (environ or {}),
            log=self.home / "logs" / f"{name}.log",
            stack_id=self.state.stack_id,
        )
        self.note(processes=(*self.state.processes, noted))

    def start(self) -> StackState:
        api = self.settings.api
        port = api.port or free_port(api.host)
        check_port(api.host, port)
        self._redis()
        local = "127.0.0.1" if api.host in {"0.0.0.0", "::", ""} else api.host
        host = f"[{local}]" if ":" in local else local
        self.environ["MODM_API__PORT"] = str(port)
        self.note(url=f"http://{host}:{port}")
        count = self.options.workers if self.options.workers is not None else gpu_count() or 2
        self.launch("orchestrator", *MODM, "orchestrator")
        for gpu in range(count):
            self.launch(f"worker{gpu}", *MODM, "worker", "--gpu", str(gpu), "--share", str(max(1, count)))
        self.launch("controller", *MODM, "controller", "run")
        if self.options.flower:
            flower_port = choose_port(5555)
            self.launch("flower", *MODM, "flower", "--port", str(flower_port))
            self.note(flower_url=f"http://127.0.0.1:{flower_port}")
        self.wait("orchestrator", self._orchestrator_problem)
        for gpu in range(count):
            self.wait(f"worker{gpu}", functools.partial(self._worker_problem, str(gpu)))
        self.check_alive()
        return self.state

    def _redis(self) -> None:
        if self.settings.redis_url is not None:
            url = self.settings.redis_url.get_secret_value()
            if problem := ping(url):
                raise UnavailableError(f"the Redis of MODM_REDIS_URL does not answer: {problem}", field="redis_url")
            self.say("redis: the one of MODM_REDIS_URL")
        else:
            plan = plan_redis(self.home / "redis", fsync=self.settings.redis_fsync)
            url = plan.url
            self.launch("redis", *plan.command)
            self.wait("redis", lambda: ping(url, timeout_s=0.5))
        self.environ["MODM_REDIS_URL"] = url
        self.note(redis_url=url)

    def _orchestrator_problem(self) -> str | None:
        import httpx

        try:
            answer = httpx.get(f"{self.state.url}/readyz", timeout=5, trust_env=False)
            said = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            return f"is starting ({type(error).__name__})"
        # Workers come later; without one the service itself is ready to take work.
        return None if answer.is_success else "; ".join(map(str, said.get("problems", ["not ready"])))

    def _worker_problem(self, gpu: str) -> str | None:
        from modm_tasks.ledger import Ledger

        here = socket.gethostname()
        try:
            ready = Ledger.from_settings(
                self.settings.model_copy(update={"redis_url": SecretStr(self.state.redis_url)})
            )
            return None if any(w.gpu == gpu and w.host == here for w in ready.workers()) else "loading its models"
        except UnavailableError as error:
            return str(error)

    def wait(self, name: str, problem: Callable[[], str | None]) -> None:
        """Until ``problem`` is None. A process that ends meanwhile, whichever it is, ends the wait with its log."""
        began = told = time.monotonic()
        while (last := problem()) is not None:
            self.check_alive()
            now = time.monotonic()
            if now - told > TELL_EVERY_S:
                told = now
                self.say(f"{name}: {last} ({now - self.began:.0f} s)")
            if now - began > self.options.ready_timeout_s:
                self._show_tail(name)
                raise UnavailableError(f"{name} is not ready after {self.options.ready_timeout_s:g} s: {last}")
            time.sleep(0.05 if name == "redis" else 0.2)
        self.say(f"{name} ready ({time.monotonic() - self.began:.1f} s)")

    def check_alive(self) -> None:
        for noted in self.state.processes:
            if (status := processes.exit_status(noted)) is not None:
                kind = UnavailableError if status == UnavailableError.exit_code else ModmError
                self._show_tail(noted.name)
                raise kind(f"{noted.name} ended with status {status} while the stack was starting")

    def _show_tail(self, name: str, lines: int = 12) -> None:
        log = self.home / "logs" / f"{name}.log"
        self.say(f"--- end of {log}")
        for line in log.read_text(errors="replace").splitlines()[-lines:]:
            self.say(line)


def check_port(host: str, port: int) -> None:
    """Raises UnavailableError naming port and holder."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            holder = processes.port_holder(port)
            raise UnavailableError(
                f"port {port} on {host}: {error.strerror}{f', held by {holder}' if holder else ''}; "
                "set MODM_API__PORT to another, or to 0 for any free one",
                field="api.port",
            ) from None


def choose_port(preferred: int) -> int:
    """``preferred`` when it is free, else any."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", preferred))
        except OSError:
            return free_port()
    return preferred


def up(settings: Settings, options: UpOptions, say: Say) -> StackState:
    """Start everything and wait until it serves. Raises UnavailableError or ModmError, with nothing left behind."""
    home = settings.home.absolute()
    with locked(home):
        old = read_state(home)
        if old is not None:
            running = [p.name for p in old.processes if processes.alive(p)]
            if running:
                whole = len(running) == len(old.processes)
                what = f"is already up at {old.url}" if whole else f"has parts left running: {', '.join(running)}"
                raise UnavailableError(f"the stack of {home} {what}; `modm down` stops it")
            processes.kill_marked(old.stack_id)
        starter = Starter(settings, options, say)
        try:
            return starter.start()
        except BaseException:
            stop_state(starter.state, home, grace_s=5.0, say=lambda text: None)
            raise


def down(home: Path, *, grace_s: float, say: Say) -> bool:
    """Stop what `up` started, also after a crash. False when nothing was noted; safe to repeat."""
    home = home.absolute()
    if not state_path(home).exists():
        return False
    with locked(home):
        state = read_state(home)
        if state is None:
            return False
        stop_state(state, home, grace_s=grace_s, say=say)
    return True


def stop_state(state: StackState, home: Path, *, grace_s: float, say: Say) -> None:
    for tier in TIERS:
        members = [p for p in state.processes if p.name.startswith(tier)]
        for name in processes.stop(members, grace_s=grace_s):
            say(f"{name} did not end in {grace_s:g} s and was killed")
    if left := processes.kill_marked(state.stack_id):
        say(f"killed {left} left-over processes")
    state_path(home).unlink(missing_ok=True)


def died(state: StackState) -> list[str]:
    """Names of noted processes that no longer run."""
    return [p.name for p in state.processes if not processes.alive(p)]


def as_json(state: StackState) -> str:
    """What `modm up --json` prints: no secret in it."""
    shown = {"url": state.url, "flower_url": state.flower_url, "processes": {p.name: p.pid for p in state.processes}}
    return json.dumps(shown, indent=2)
