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
from modm_tasks.settings import Settings, load_settings
from ops import processes
from ops.processes import Noted
from ops.redis_server import free_port, ping, plan_redis
from ops.stack import MODM


class Rig:
    """Redis, orchestrator, controller and workers; dead ones come back within half a second."""

    def __init__(self, home: Path, environ: Mapping[str, str], *, workers: int) -> None:
        self.home, self.stack_id = home, uuid.uuid4().hex
        self.plan = plan_redis(home / "redis", fsync="always")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        ours = {"MODM_HOME": str(home), "MODM_REDIS_URL": self.plan.url, "MODM_API__PORT": str(port)}
        self.environ = {k: v for k, v in environ.items() if not k.startswith("MODM_")} | ours | _quick(environ)
        self.settings: Settings = load_settings(home=home, redis_url=self.plan.url)
        self.ledger = Ledger.from_settings(self.settings)
        self.client = Client(self.url)
        self.worker_count = workers
        self.commands: dict[str, tuple[str, ...]] = {
            "redis": self.plan.command,
            "orchestrator": (*MODM, "orchestrator"),
            "controller": (*MODM, "controller", "run"),
        } | {f"worker{i}": (*MODM, "worker", "--gpu", str(i), "--share", str(workers)) for i in range(workers)}
        self.running: dict[str, Noted] = {}
        self.restarts = 0
        self._end = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def start(self, *, timeout_s: float = 180.0) -> None:
        """Start everything. Raises ModmError where it is not whole in time."""
        self._launch("redis")
        self.wait(lambda: ping(self.plan.url, timeout_s=0.5) is None, 20, "Redis")
        for name in self.commands:
            if name != "redis":
                self._launch(name)
        self._supervisor.start()
        self.wait(self.whole, timeout_s, "the stack")

    def stop(self) -> None:
        """End everything; nothing that carries this run's mark is left."""
        self._end.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        processes.kill_marked(self.stack_id)
        self.client.close()

    def _launch(self, name: str) -> None:
        log = self.home / "logs" / f"{name}.log"
        self.running[name] = processes.start(
            name, self.commands[name], environ=self.environ, log=log, stack_id=self.stack_id
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
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.running[name].pid, signal.SIGKILL)

    def kill_child(self, index: int) -> None:
        """The GPU child of one worker, whose pid it says itself."""
        ready = self.ledger.workers()
        if ready:
            with contextlib.suppress(ProcessLookupError):
                os.kill(ready[index % len(ready)].pid, signal.SIGKILL)

    def drop_connections(self) -> None:
        client = redis.Redis.from_url(self.plan.url)
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        client.close()

    def whole(self) -> bool:
        """The orchestrator takes work, the controller runs, and every worker is ready."""
        try:
            return bool(self.client.get("/readyz")["ready"]) and len(self.live_workers()) == self.worker_count
        except ModmError:
            return False

    def live_workers(self) -> list[str]:
        """Ready workers whose child is alive: a killed one's word stands in Redis for some seconds more."""
        return [w.worker for w in self.ledger.workers() if processes.start_time(w.pid) is not None]

    def wait(self, condition: Callable[[], object], timeout_s: float, what: str) -> float:
        """Seconds until ``condition()`` is true. Raises ModmError at the deadline."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout_s:
                raise ModmError(f"waited {timeout_s:g} s for {what}; logs in {self.home / 'logs'}")
            self._end.wait(0.1)
        return time.monotonic() - began


def _quick(environ: Mapping[str, str]) -> dict[str, str]:
    """Settings that the caller chose, and a lease short enough to see recoveries in a bounded run."""
    chosen = {k: v for k, v in environ.items() if k.startswith("MODM_") and k not in {"MODM_HOME", "MODM_REDIS_URL"}}
    return {"MODM_WORKER__LEASE_S": "4", "MODM_CONTROLLER__PERIOD_S": "5"} | chosen
