"""The two Celery tasks of a GPU worker, and the start and end of its child process.

This module imports no torch: the worker's parent and the orchestrator import it too. Under spawn the signal handlers
fire in the child only because they live in a module that the app includes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject
from celery.signals import (
    celeryd_after_setup,
    setup_logging,
    worker_process_init,
    worker_process_shutdown,
    worker_shutdown,
)
from kombu.exceptions import OperationalError

from modm_tasks import logs
from modm_tasks.app import app
from modm_tasks.completions import announce
from modm_tasks.errors import ModmError
from modm_tasks.queues import LARGE_GEN, PREPARE, SMALL_REFINE, TASK_OF_QUEUE
from modm_tasks.settings import Settings, get_settings
from workers.pinning import gpu_of, pinned, thread_count

if TYPE_CHECKING:
    from workers.runtime import Runtime

log = logging.getLogger(__name__)

#: How long an unwell worker leaves a token alone, so that a well one takes it.
UNWELL_PAUSE_S = 2.0

_runtime: Runtime | None = None


@app.task(name=TASK_OF_QUEUE[LARGE_GEN])  # type: ignore[untyped-decorator]
def large_gen(request_id: str = "", *numbers: float) -> dict[str, Any]:
    """Serve the best ready request of ``large-gen``. The id is for Flower and logs: the ledger decides what is next."""
    return _serve(LARGE_GEN)


@app.task(name=TASK_OF_QUEUE[SMALL_REFINE])  # type: ignore[untyped-decorator]
def small_refine(request_id: str = "", *numbers: float) -> dict[str, Any]:
    """Serve the best ready request of ``small-refine``."""
    return _serve(SMALL_REFINE)


@app.task(name=PREPARE)  # type: ignore[untyped-decorator]
def prepare_role(role: str) -> dict[str, Any]:
    """Load the model of a role that this worker is about to have. Comes by its direct queue, which is polled last."""
    if _runtime is None:
        raise Reject("this worker is not ready", requeue=True)
    model = _runtime.settings.large_model if role == "large" else _runtime.settings.small_model
    try:
        load_s = _runtime.engine.prepare(model)
    except ModmError as error:
        # The controller moves the worker after a while all the same, and the first task meets what is wrong.
        log.error("cannot prepare for role %s: %s", role, error)
        return {"model": model, "error": str(error)}
    _runtime.publish()
    log.info("prepared for role %s: %s in %.2f s", role, model, load_s)
    return {"model": model, "load_s": load_s}


def _serve(queue: str) -> dict[str, Any]:
    from workers.serve import UNWELL, serve_one

    if _runtime is None:  # the models did not load, and the worker is on its way out
        raise Reject("this worker is not ready", requeue=True)
    out = serve_one(_runtime, queue)
    if out["outcome"] == UNWELL:
        time.sleep(UNWELL_PAUSE_S)
        raise Reject(out["reason"], requeue=True)
    if out["served"] is not None:
        announce(app, out["served"])
    if waits_in := out.get("waits_in"):
        _send_token(waits_in, out["served"])
    return out


def _send_token(queue: str, request_id: str) -> None:
    """Say at once that the request waits again. The orchestrator's watchdog would do so too, some seconds later."""
    try:
        app.send_task(TASK_OF_QUEUE[queue], args=[request_id, 0, 0.0], queue=queue)
    except OperationalError as error:
        log.warning("token not sent: %s", error, extra={"request_id": request_id})


@setup_logging.connect  # type: ignore[untyped-decorator]
def own_logs(**_: Any) -> None:
    """Celery's own lines in the form of all other processes; being connected here turns its own set-up off."""
    logs.configure(get_settings(), "worker")


def failure_file(settings: Settings, worker: str) -> Path:
    """Where a child says why it could not start, so that its parent can exit with that reason and code."""
    return settings.home.absolute() / "workers" / f"{worker.replace('/', '_')}.error"


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def pin_device(sender: str, **_: Any) -> None:
    """In the parent, before the child starts: a plain ``celery worker -n gpu0@%h`` gets its device too."""
    settings = get_settings()
    os.environ.update(pinned(gpu_of(sender), os.environ, threads=thread_count(settings)))
    failure_file(settings, sender).unlink(missing_ok=True)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def start_child(sender: str | None = None, **_: Any) -> None:
    """In the child: load everything, then say ready. A failure ends the whole worker with one clear line."""
    global _runtime
    settings, worker = get_settings(), str(sender)
    logs.configure(settings, worker)
    try:
        from workers.runtime import Runtime

        _runtime = Runtime.from_settings(settings, worker)
    except ModmError as error:
        code, line = error.exit_code, str(error)
    except Exception as error:
        log.exception("worker %s cannot start", worker)
        code, line = 1, f"{type(error).__name__}: {error}"
    else:
        _runtime.start()
        log.info("ready: %s", ", ".join(_runtime.engine.resident()), extra={"worker": worker})
        return
    path = failure_file(settings, worker)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{code} {line}", encoding="utf-8")
    log.critical("worker %s cannot start: %s", worker, line)
    os.kill(os.getppid(), signal.SIGTERM)


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def stop_child(**_: Any) -> None:
    """In the child: not ready any more."""
    global _runtime
    if _runtime is not None:
        _runtime.stop()
        _runtime = None


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def leave(sender: Any = None, **_: Any) -> None:
    """In the parent, last: where the child could not start, exit with its line and code."""
    path = failure_file(get_settings(), str(getattr(sender, "hostname", sender)))
    if path.exists():
        code, _space, line = path.read_text(encoding="utf-8").partition(" ")
        path.unlink(missing_ok=True)
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(int(code))
