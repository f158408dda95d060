"""Caches with images in them, and the cache routes on a real port, for tests of administration and the CLI."""

from __future__ import annotations

import json
import socket
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from typer.testing import CliRunner, Result

from modm_tasks.image_store import ImageStore, path_for, to_png
from modm_tasks.settings import CacheSettings, Settings
from orchestrator.replies import add_error_handlers
from vector_store.backends import open_backend
from vector_store.cache import ImageCache
from vector_store.cli import cache_app
from vector_store.embedder import HashEmbedder
from vector_store.entries import ImageEntry, Use
from vector_store.http import build_router

EMBEDDER = HashEmbedder()


def uid(n: int) -> str:
    return str(uuid.UUID(int=n + 1))


def use(image_id: str, at_s: float, skipped_steps: int) -> Use:
    return Use(id=image_id, namespace="default", at_s=at_s, skipped_steps=skipped_steps)


def make_cache(home: Path, url: str = "edge:", identity: str = EMBEDDER.identity, **cache: Any) -> ImageCache:
    settings = Settings(home=home, qdrant_url=url, cache=CacheSettings(**cache))
    return ImageCache(open_backend(settings), identity, EMBEDDER.dim, settings, ImageStore(settings.image_root))


def png(prompt: str, colour: int = 0) -> bytes:
    image = Image.new("RGB", (16, 16), (colour % 256, 80, 80))
    image.info["modm:prompt"] = prompt
    return to_png(image)


def put(cache: ImageCache, n: int, prompt: str = "", **fields: Any) -> ImageEntry:
    prompt = prompt or f"picture number{n}"
    uri = cache.images.write_atomic(path_for(uid(n), 1), png(prompt, n))
    values: dict[str, Any] = {"depth": 0, "created_s": 100.0 + n} | fields
    entry = ImageEntry(id=uid(n), prompt=prompt, model="large", seed=n, size="16x16", uri=uri, **values)
    return cache.add(entry, EMBEDDER.embed_texts([prompt])[0])


def make_folder(folder: Path, n: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i:04}.png").write_bytes(png(f"picture number{i}", i))
    rows = [json.dumps({"file": f"{i:04}.png", "prompt": f"picture number{i}", "seed": i}) for i in range(n)]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


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
