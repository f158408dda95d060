"""Health checks of containers: `python -m ops.health worker NODE` and `python -m ops.health url URL`.

A ping proves nothing: it is answered by the worker's parent before the models are loaded, and by a worker that lost its
queues at a reconnect. So a worker is healthy when its GPU child says that it is ready, and a role queue is among the
queues that it consumes. A drained worker consumes none on purpose, and is healthy too.
"""

from __future__ import annotations

import argparse
import socket
import sys

from modm_tasks.errors import ModmError


def worker_problem(node: str) -> str | None:
    """None when the worker can serve, else one line. ``%h`` in ``node`` is this host's name."""
    from modm_tasks.app import make_app
    from modm_tasks.ledger import Ledger
    from modm_tasks.queues import TASK_OF_QUEUE
    from modm_tasks.settings import load_settings

    settings = load_settings()
    name = node.replace("%h", socket.gethostname())
    try:
        ledger = Ledger.from_settings(settings)
        status = next((w for w in ledger.workers() if w.worker == name), None)
        desired = ledger.desired_roles().get(name)
    except ModmError as error:
        return str(error)
    if status is None:
        return f"{name}: the GPU child has not said that it is ready"
    if status.unwell:
        return f"{name}: unwell: {status.unwell}"
    if desired is not None and desired.drained:
        return None
    with make_app(settings) as app:
        replies = app.control.inspect(destination=[name], timeout=5).active_queues() or {}
    queues = {queue["name"] for queue in replies.get(name, [])}
    return None if queues & set(TASK_OF_QUEUE) else f"{name}: consumes no role queue, only {sorted(queues)}"


def url_problem(url: str) -> str | None:
    """None when ``url`` answers with 2xx."""
    import httpx

    try:
        answer = httpx.get(url, timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        return f"{url}: {type(error).__name__}"
    return None if answer.is_success else f"{url}: status {answer.status_code}"


def main(argv: list[str] | None = None) -> int:
    """0 healthy, 1 not, with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m ops.health")
    parser.add_argument("what", choices=["worker", "url"])
    parser.add_argument("target")
    given = parser.parse_args(argv)
    problem = worker_problem(given.target) if given.what == "worker" else url_problem(given.target)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
