"""The cache routes on a real port, for tests of the CLI."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner, Result

from orchestrator.api import add_error_handlers
from vector_store.cache import ImageCache
from vector_store.cli import cache_app
from vector_store.embedder import HashEmbedder
from vector_store.http import build_router

EMBEDDER = HashEmbedder()


class Served:
    """The router on a real port, the client and the CLI."""

    def __init__(self, cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        self.purged: list[str] = []
        self.in_use: set[str] = set()
        app = FastAPI()
        router = build_router(
            lambda: cache,
            lambda: EMBEDDER,
            in_use=lambda asked: self.in_use.intersection(asked),
            referenced=lambda asked: self.in_use.intersection(asked),
            on_purge=self.purged.extend,
        )
        app.include_router(router, prefix="/v1/cache")
        add_error_handlers(app)
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        monkeypatch.setenv("MODM_URL", self.url)

    def modm(self, *args: str | Path) -> Result:
        return CliRunner().invoke(cache_app, [str(a) for a in args])

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self.sock.close()
