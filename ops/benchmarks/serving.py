"""A stack of its own for one benchmark: bundled models, pooled workers, nothing of the caller's MODM_ settings."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from modm_tasks.client import Client
from modm_tasks.errors import ModmError
from modm_tasks.settings import load_settings
from ops.demo import MODM, demo_environ

WORKERS = 2


def modm(*args: str, environ: Mapping[str, str]) -> None:
    """One command of the stack. Raises ModmError with what it was."""
    if subprocess.run([*MODM, *args], env=dict(environ), stdout=sys.stderr, check=False).returncode:
        raise ModmError(f"`modm {args[0]}` failed")


@contextmanager
def serving(workers: int = WORKERS, **settings: str) -> Iterator[tuple[Client, Path]]:
    """(client, folder for files of the run). ``settings``: further environment, e.g. ``MODM_CACHE__MAX_DEPTH="2"``."""
    for name in [n for n in os.environ if n.startswith("MODM_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="modm-bench-") as home:
        environ = demo_environ(os.environ, Path(home), "diffusers") | settings
        try:
            modm("up", "--workers", str(workers), "--mode", "pooled", "--no-flower", environ=environ)
            with Client.from_settings(load_settings(home=Path(home))) as client:
                yield client, Path(home)
        finally:
            modm("down", "--grace-s", "5", environ=environ)
