"""The real serving path for tests: orchestrator and workers as processes, fake engine, over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from modm_tasks.client import Client
from modm_tasks.settings import Settings
from ops.redis_server import free_port
from tests.support.processes import Process, Processes, wait_until


@dataclass
class TestStack:
    """A running stack. ``client`` is the project's own; ``processes`` starts and ends more."""

    __test__ = False

    url: str
    settings: Settings
    environ: dict[str, str]
    processes: Processes
    orchestrator: Process
    workers: list[Process]
    client: Client

    def add_worker(self, gpu: int | None = None, *args: str, env: Mapping[str, str] | None = None) -> Process:
        """Start one more worker (the next GPU by default). Does not wait until it is ready."""
        gpu = len(self.workers) if gpu is None else gpu
        worker = self.processes.modm("worker", "--gpu", str(gpu), *args, name=f"worker{gpu}", env=env)
        self.workers.append(worker)
        return worker

    def restart_orchestrator(self, *, timeout_s: float = 60.0) -> Process:
        """Kill it the hard way, start it again on the same port, and wait until it takes work."""
        self.orchestrator.kill()
        self.orchestrator = self.processes.modm("orchestrator")
        self.wait_ready(timeout_s=timeout_s)
        return self.orchestrator

    def get(self, path: str) -> Any:
        answer = httpx.get(self.url + path, timeout=10, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def wait_ready(self, *, workers: int | None = None, timeout_s: float = 60.0) -> None:
        """The orchestrator takes submits, and so many workers said that they are ready."""

        def served() -> bool:
            assert self.orchestrator.alive, f"the orchestrator died:\n{self.processes.logs()}"
            try:
                return httpx.get(f"{self.url}/healthz", timeout=5, trust_env=False).is_success
            except httpx.TransportError:
                return False

        try:
            wait_until(served, timeout_s, "the orchestrator to answer")
            if workers:
                wait_until(lambda: self.ready_workers() >= workers, timeout_s, f"{workers} ready workers", poll_s=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.processes.logs()}") from error

    def ready_workers(self) -> int:
        answer = self.get("/v1/workers")
        rows = answer["workers"] if isinstance(answer, dict) else answer
        return sum(1 for row in rows if row.get("ready", True))


def start_stack(
    settings: Settings, environ: Mapping[str, str], procs: Processes, *, workers: int = 2, controller: bool = False
) -> TestStack:
    """Start orchestrator and workers as ``environ`` says, and wait until all are ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {**environ, "MODM_API__PORT": str(port), "MODM_URL": url}
    procs.environ = env
    stack = TestStack(
        url=url,
        settings=settings,
        environ=env,
        processes=procs,
        orchestrator=procs.modm("orchestrator"),
        workers=[],
        client=Client(url),
    )
    for _ in range(workers):
        stack.add_worker()
    if controller:
        procs.modm("controller", "run", name="controller")
    stack.wait_ready(workers=workers)
    return stack
