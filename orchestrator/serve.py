"""The orchestrator process: settings, logs, the HTTP server, a clean end."""

from __future__ import annotations

import logging
import socket
import sys

from modm_tasks.errors import UnavailableError
from modm_tasks.logs import configure
from modm_tasks.settings import Settings, load_settings

log = logging.getLogger(__name__)

#: How long a thread may keep the interpreter while another wants it. Python's 5 ms are most of what a submit takes here,
#: and the pipeline's thread is always busy under load.
SWITCH_S = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UnavailableError that names the port where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # An explicit protocol, because asyncio turns Nagle's algorithm off for IPPROTO_TCP sockets only: 40 ms a call else.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(512)
    except OSError as error:
        sock.close()
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror}", field="api.port") from error
    return sock


def serve(*, host: str | None = None, port: int | None = None) -> None:
    """Serve until told to stop. Raises ModmError where it cannot start."""
    settings = load_settings()
    changes = {k: v for k, v in {"host": host, "port": port}.items() if v is not None}
    if changes:
        settings = settings.model_copy(update={"api": settings.api.model_copy(update=changes)})
    configure(settings, "orchestrator")
    sock = bind(settings.api.host, settings.api.port)
    try:
        run(settings, sock)
    finally:
        sock.close()


def run(settings: Settings, sock: socket.socket) -> None:
    import uvicorn

    from orchestrator.auth import Gate, check_listen
    from orchestrator.compose import make_app
    from orchestrator.submit import SubmitFirst

    check_listen(settings)
    sys.setswitchinterval(SWITCH_S)
    gate = Gate.from_settings(settings)
    app = SubmitFirst(make_app(settings, gate), gate)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=3, timeout_keep_alive=75
    )
    log.info("listening on http://%s:%d", *sock.getsockname()[:2])
    uvicorn.Server(config).run(sockets=[sock])
