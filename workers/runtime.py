"""The one runtime of a GPU child: engine, embedder, image store, ledger, and the thread that says "ready".

Made once per child process, after spawn, because CUDA, gRPC and Redis connections must not cross a fork. Ready means
that every model has run a real warm-up step: a record with a time to live in Redis, written by this process only.
A control message cannot reach the child, and `celery inspect ping` is answered by its parent, so neither says anything
about the GPU.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

from modm_tasks.cluster import Control
from modm_tasks.errors import UnavailableError
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import WorkerStatus
from modm_tasks.safety import load_hook
from modm_tasks.settings import Settings
from workers.catalogue import check_pair, named
from workers.device import device_name, profiled_step_s
from workers.engine import Engine
from workers.memory import rss_mib
from workers.pinning import gpu_of, served_models

if TYPE_CHECKING:
    from vector_store.embedder import Embedder

log = logging.getLogger(__name__)

STATUS_TTL_S, STATUS_EVERY_S = 10, 3.0


def make_engine(settings: Settings) -> Engine:
    """The engine that the settings name. Only the diffusers one imports torch."""
    if settings.worker.engine == "fake":
        from workers.testing import FakeEngine

        return FakeEngine(settings)
    check_pair(settings)  # a wrong name is told before the seconds that importing torch takes
    from workers.diffusers_engine import DiffusersEngine

    return DiffusersEngine(settings)


class Runtime:
    """What `serve_one` works with. ``worker`` is the Celery node name, e.g. ``gpu0@host``."""

    def __init__(
        self,
        settings: Settings,
        *,
        worker: str,
        engine: Engine,
        embedder: Embedder,
        store: ImageStore,
        ledger: Ledger,
    ) -> None:
        self.settings, self.worker = settings, worker
        self.engine, self.embedder, self.store, self.ledger = engine, embedder, store, ledger
        self.device_name = settings.worker.device_name or device_name(engine.device)
        self._profile_step_s = profiled_step_s(settings, self.device_name)
        self.safety_hook = load_hook(settings.safety_hook)
        self.busy_with: str | None = None
        self.unwell: str | None = None
        self._started_s = time.time()
        self._end = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ready", daemon=True)

    @classmethod
    def from_settings(cls, settings: Settings, worker: str) -> Runtime:
        """Load everything: engine, models with a warm-up step each, embedder. Raises ConfigError or EngineError."""
        from vector_store.embedder import load_embedder

        settings = named(settings)
        engine = make_engine(settings)
        engine.load(served_models(settings))
        device = "cpu" if engine.device == "fake" else engine.device
        logging.disable(logging.INFO)  # open_clip tells its life on the root logger
        try:
            embedder = load_embedder(settings.embedder, device)
        finally:
            logging.disable(logging.NOTSET)
        store, ledger = ImageStore(settings.image_root), Ledger.from_settings(settings)
        return cls(settings, worker=worker, engine=engine, embedder=embedder, store=store, ledger=ledger)

    def start(self) -> None:
        """Say ready now, and go on saying so."""
        self.publish()
        self._thread.start()

    def stop(self) -> None:
        """Take the ready mark away. Best effort: it expires by itself too."""
        self._end.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)
        try:
            self.ledger.worker_gone(self.worker)
        except UnavailableError as error:
            log.warning("cannot sign off %s: %s", self.worker, error)

    def set_busy(self, request_id: str | None) -> None:
        """Show at the next beat which request is being drawn."""
        self.busy_with = request_id

    def say_soon(self) -> None:
        """Publish the status now rather than at the next beat: another model is resident."""
        self._changed.set()

    def set_unwell(self, reason: str | None) -> None:
        """Tell the controller, now, that this worker should get no work (or may again)."""
        self.unwell = reason
        self._changed.set()

    def role(self) -> str | None:
        """The role that the controller wants; None when unknown or Redis is away."""
        try:
            return self.ledger.desired_role(self.worker)
        except UnavailableError:
            return None

    def control(self) -> Control:
        """What may change while the system runs; as in the settings when Redis is away."""
        try:
            return self.ledger.control()
        except UnavailableError:
            return Control.model_validate({})

    def status(self) -> WorkerStatus:
        """What is published: models, prices, memory, health."""
        return WorkerStatus(
            worker=self.worker,
            gpu=gpu_of(self.worker),
            host=socket.gethostname(),
            pid=os.getpid(),
            device=self.engine.device,
            models=self.engine.resident(),
            large_model=self.settings.large_model,
            small_model=self.settings.small_model,
            embedder=self.embedder.identity,
            busy_with=self.busy_with,
            role=self.role(),
            unwell=self.unwell,
            started_s=self._started_s,
            rss_mib=rss_mib(),
            swap_s=self.engine.swap_s(),
            device_name=self.device_name,
            profile_step_s=self._profile_step_s,
        )

    def publish(self) -> None:
        """Write the status once. Redis being away is noted and survived: the next beat tries again."""
        try:
            self.ledger.worker_ready(self.status(), STATUS_TTL_S)
        except UnavailableError as error:
            log.warning("cannot publish the status of %s: %s", self.worker, error)

    def _run(self) -> None:
        while not self._end.is_set():
            self._changed.wait(STATUS_EVERY_S)
            self._changed.clear()
            if not self._end.is_set():
                self.publish()
