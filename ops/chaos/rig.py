"""The stack under test with a supervisor, which starts again what died, as systemd or Compose would."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import redis

from modm_tasks.client import Client
from modm_tasks.errors import ModmError
from modm_tasks.ledger import Ledger
from modm_tasks.output import note
from modm_tasks.queues import TASK_OF_QUEUE
from modm_tasks.redis_client import guarded
from modm_tasks.settings import Settings, load_settings
from ops import processes
from ops.chaos.disk import SmallDisk
from ops.chaos.hosts import SecondHost
from ops.chaos.mechanisms import Limits
from ops.chaos.poison import HOOK
from ops.processes import Noted
from ops.redis_server import free_port, ping, plan_redis
from ops.stack import MODM, TIERS
from orchestrator.controller.loop import LOCK
from workers.runtime import STATUS_TTL_S

#: A lease short enough to see recoveries in a bounded run; everything of modm-plus on, its limits low enough to be met;
#: prompts that kill.
QUICK = {
    "MODM_WORKER__LEASE_S": "2",
    "MODM_CONTROLLER__PERIOD_S": "5",
    "MODM_ROUTING__POLICY": "modm-plus",
    "MODM_ROUTING__WAIT_DEPTH": "2",
    "MODM_CACHE__MAX_DEPTH": "2",
    "MODM_SAFETY_HOOK": HOOK,
}
#: Patience of those that wait on another's image, in leases: a dead worker's request is away for less, and poison takes
#: more to fail.
WAIT_LEASES = 2
SKEW = str(Path(__file__).with_name("skew"))
CLOCK = "MODM_TEST_CLOCK_OFFSET_S"


def rig_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment; its own MODM_ settings win over QUICK, but for home and Redis."""
    return QUICK | {k: v for k, v in environ.items() if k not in {"MODM_HOME", "MODM_REDIS_URL", "MODM_API__PORT"}}


class Rig:
    """Redis, orchestrator, controller and workers; dead ones come back within half a second."""

    def __init__(self, home: Path, environ: Mapping[str, str], *, workers: int) -> None:
        self.home, self.stack_id = home, uuid.uuid4().hex
        self.disk, self.far, self.left_out = _extras(home)
        self.plan = plan_redis(home / "redis", fsync="always")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        ours = {"MODM_HOME": str(home), "MODM_REDIS_URL": self.plan.url, "MODM_API__PORT": str(port)}
        self.environ = rig_environ(environ) | ours
        self.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SKEW, environ.get("PYTHONPATH"))))
        #: What single processes are given beside that.
        self.own: dict[str, dict[str, str]] = {}
        lease_s = float(self.environ["MODM_WORKER__LEASE_S"])
        self.environ.setdefault("MODM_ROUTING__WAIT_BOUND_S", str(WAIT_LEASES * lease_s))
        base = load_settings(home=home, redis_url=self.plan.url)
        self.settings: Settings = base.model_copy(
            update={"worker": base.worker.model_copy(update={"lease_s": lease_s})}
        )
        self.limits = Limits(
            wait_depth=int(self.environ["MODM_ROUTING__WAIT_DEPTH"]),
            max_depth=int(self.environ["MODM_CACHE__MAX_DEPTH"]),
        )
        self.ledger = Ledger.from_settings(self.settings)
        self.client = Client(self.url)
        self.worker_count = workers
        self.commands: dict[str, tuple[str, ...]] = {
            "redis": self.plan.command,
            "orchestrator": (*MODM, "orchestrator"),
            "controller": (*MODM, "controller", "run"),
        } | {f"worker{i}": (*MODM, "worker", "--gpu", str(i), "--share", str(workers)) for i in range(workers)}
        if self.far is not None:
            self._move_last_worker(self.far)
        self.running: dict[str, Noted] = {}
        self.restarts = 0
        self._end = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def _move_last_worker(self, far: SecondHost) -> None:
        """To the other host; Redis listens there too."""
        name = f"worker{self.worker_count - 1}"
        self.commands["redis"] += ("--bind", "127.0.0.1", far.ours)
        self.commands[name] = (*far.prefix, *self.commands[name])
        self.own[name] = {"MODM_REDIS_URL": self.plan.url.replace("127.0.0.1", far.ours)}

    def start(self, *, timeout_s: float = 180.0) -> None:
        """Start everything. Raises ModmError where it is not whole in time."""
        self._launch("redis")
        self.wait(lambda: ping(self.plan.url, timeout_s=0.5) is None, 20, "Redis")
        for name in self.commands:
            if name != "redis":
                self._launch(name)
        self._supervisor.start()
        self.wait(self.whole, timeout_s, "the stack")

    def stop(self) -> int:
        """End everything as `modm down` does. Returns how many processes were left then; they are killed."""
        self._end.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        for tier in TIERS:
            processes.stop([p for name, p in self.running.items() if name.startswith(tier)], grace_s=20.0)
        left = processes.kill_marked(self.stack_id)
        self.client.close()
        self.ledger.redis.close()
        return left

    def remove(self) -> None:
        """Give the small disk and the second host back. Images are gone then."""
        if self.disk is not None:
            self.disk.remove()
        if self.far is not None:
            self.far.remove()

    def _launch(self, name: str) -> None:
        log = self.home / "logs" / f"{name}.log"
        self.running[name] = processes.start(
            name, self.commands[name], environ=self.environ | self.own.get(name, {}), log=log, stack_id=self.stack_id
        )

    def _supervise(self) -> None:
        while not self._end.wait(0.25):
            for name, noted in list(self.running.items()):
                if processes.alive(noted):
                    continue
                # The rest of its process group goes with it, as with a control group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(noted.pid, signal.SIGKILL)
                processes.wait_gone(noted)
                if not self._end.is_set():
                    self.restarts += 1
                    self._launch(name)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until the system says that it is gone."""
        noted = self.running[name]
        with contextlib.suppress(ProcessLookupError):
            os.kill(noted.pid, signal.SIGKILL)
        self.soon(lambda: not processes.alive(noted), 5.0)

    def skew(self, name: str, offset_s: float) -> None:
        """A process whose clock is wrong from its next start on, which is now."""
        self.own[name] = self.own.get(name, {}) | {CLOCK: str(offset_s)}
        self.kill(name)

    def pids(self) -> dict[str, int]:
        """Every process of the moment by name, the GPU children too."""
        found = {name: noted.pid for name, noted in list(self.running.items())}
        with contextlib.suppress(ModmError):
            found |= {f"GPU child of {worker}": pid for worker, pid in self.live_workers().items()}
        return found

    def kill_child(self, index: int) -> None:
        """The GPU child of one worker, whose pid it says itself."""
        ready = self.live_workers()
        if ready:
            pid = ready[sorted(ready)[index % len(ready)]]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.soon(lambda: processes.start_time(pid) is None, 5.0)  # a gigabyte is not given back at once

    def kill_store(self) -> None:
        """The process of the embedded vector store, which the orchestrator has started and starts again."""
        if (noted := self.running.get("orchestrator")) is not None:
            for pid in processes.family(noted.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def drop_connections(self) -> None:
        client = redis.Redis.from_url(self.plan.url)
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        client.close()

    def lose_tokens(self) -> None:
        self.ledger.redis.delete(*TASK_OF_QUEUE)

    def ready(self) -> bool:
        """The orchestrator takes work."""
        try:
            return bool(self.client.get("/readyz")["ready"])
        except ModmError:
            return False

    def pause(self, seconds: float) -> None:
        """Let a fault last."""
        self._end.wait(seconds)

    def whole(self) -> bool:
        """The orchestrator takes work, every process runs, and every worker is ready."""
        try:
            return (
                self.ready()
                and len(self.live_workers()) == self.worker_count
                and all(processes.alive(p) for p in list(self.running.values()))
            )
        except ModmError:
            return False

    def live_workers(self) -> dict[str, int]:
        """Child pid of each ready worker that lives: a killed one's word stands in Redis for some seconds more."""
        return {w.worker: w.pid for w in self.ledger.workers() if processes.start_time(w.pid) is not None}

    @guarded
    def leader(self) -> str | None:
        """Which controller leads."""
        name = self.ledger.redis.get(f"{self.ledger.prefix}leader:{LOCK}")
        return None if name is None else str(name)

    @guarded
    def said_since(self, since_s: float) -> bool:
        """Whether every worker has said that it is ready since a time of the Redis clock, told by the life of its word."""
        ages_ms = [
            STATUS_TTL_S * 1000 - self.ledger.redis.pttl(f"{self.ledger.prefix}worker:{worker}")
            for worker in self.live_workers()
        ]
        return bool(ages_ms) and max(ages_ms) < (self.ledger.now_s() - since_s) * 1000

    def soon(self, condition: Callable[[], object], timeout_s: float) -> float | None:
        """Seconds until ``condition()`` is true; None at the deadline."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout_s:
                return None
            self._end.wait(0.1)
        return time.monotonic() - began

    def wait(self, condition: Callable[[], object], timeout_s: float, what: str) -> float:
        """The same. Raises ModmError at the deadline."""
        took_s = self.soon(condition, timeout_s)
        if took_s is None:
            raise ModmError(f"waited {timeout_s:g} s for {what}; logs in {self.home / 'logs'}")
        return took_s


def _extras(home: Path) -> tuple[SmallDisk | None, SecondHost | None, list[str]]:
    """The small disk and the second host as far as this machine allows, and a line for each that it does not."""
    left_out: list[str] = []
    disk: SmallDisk | None = None
    far: SecondHost | None = None
    try:
        disk = SmallDisk(home / "images")
    except OSError as error:
        left_out.append(f"no small disk: {error}")
    try:
        far = SecondHost()
    except OSError as error:
        left_out.append(f"no second host: {error}")
    for line in left_out:
        note(line)
    return disk, far, left_out
