"""Opening a vector store by the name of its kind."""

from __future__ import annotations

import os
from pathlib import Path

from modm_tasks.settings import CacheSettings, Settings
from vector_store.backends import VectorBackend, open_backend

SERVER = os.environ.get("MODM_TEST_QDRANT_URL", "")


def open_store(kind: str, home: Path) -> VectorBackend:
    codes = kind.partition("-")[2] or "none"
    url = {"memory": "memory:", "local": f"local:{home / 'local'}", "server": SERVER}.get(kind, "edge:")
    settings = Settings(home=home, qdrant_url=url, cache=CacheSettings(quantisation=codes))  # type: ignore[arg-type]
    return open_backend(settings, apart=kind.startswith("apart"))
