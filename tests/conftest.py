"""Fixtures for all tests.

Every test has its own MODM_HOME and an environment without MODM_ variables. Tests that need Redis get a real server,
one for the session, and each test its own database of it: keys, queues and fan-out of two tests never meet. Where no
server can be started the test is skipped, but under CI=true it fails.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from modm_tasks.errors import UnavailableError
from modm_tasks.settings import Settings, get_settings, load_settings
from ops.redis_server import RunningRedis, start_redis
from tests.support.processes import Processes, processes
from tests.support.stack import TestStack, start_stack

SettingsFactory = Callable[..., Settings]

DATABASES = 4096
_databases = itertools.count(1)


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the developer's shell or of ./modm.toml reaches a test."""
    for name in list(os.environ):
        if name.startswith("MODM_") and not name.startswith("MODM_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODM_CONFIG", str(tmp_path / "modm.toml"))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    """One server for the session. Module-scoped fixtures take a database of their own: ``fresh_database(server)``."""
    try:
        server = start_redis(tmp_path_factory.mktemp("redis"), databases=DATABASES)
    except UnavailableError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a Redis: {error}", pytrace=False)
        pytest.skip(str(error))
    yield server
    server.stop()


def fresh_database(server: RunningRedis) -> str:
    """URL of a database that no other test uses."""
    return server.database(next(_databases))


@pytest.fixture
def redis_url(redis_server: RunningRedis) -> str:
    """An empty database of the session's server."""
    return fresh_database(redis_server)


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> SettingsFactory:
    """``settings(worker={"engine": "fake"}, ...)``: checked settings on this test's Redis and MODM_HOME."""

    def make(**overrides: Any) -> Settings:
        return load_settings(**({"redis_url": redis_url, "home": tmp_path / "home"} | overrides))

    return make


@pytest.fixture
def environ(redis_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of child processes: this test's Redis and MODM_HOME, fake engine, one thread each."""
    return child_environment(redis_url, tmp_path / "home")


def child_environment(redis_url: str, home: Path) -> dict[str, str]:
    """A child's environment, with Python's own warnings left as they are by default."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MODM_") or k.startswith("MODM_TEST_")}
    return kept | {
        "MODM_HOME": str(home),
        "MODM_REDIS_URL": redis_url,
        "MODM_CONFIG": str(home / "modm.toml"),
        "MODM_WORKER__ENGINE": "fake",
        "MODM_WORKER__DEVICE": "cpu",
        "MODM_WORKER__THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }


@pytest.fixture
def procs(tmp_path: Path, environ: dict[str, str]) -> Iterator[Processes]:
    """Starts processes that this test needs, and ends them."""
    with processes(tmp_path / "logs", environ) as group:
        yield group


@pytest.fixture(scope="module")
def module_stack(redis_server: RunningRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestStack]:
    """Orchestrator and two pooled workers with the fake engine, shared by the tests of one module."""
    home = tmp_path_factory.mktemp("stack")
    url = fresh_database(redis_server)
    environ = child_environment(url, home) | {"MODM_WORKER__MODE": "pooled", "MODM_EMBEDDER": "fake"}
    with ExitStack() as stack:
        group = stack.enter_context(processes(home / "logs", environ))
        yield start_stack(load_settings(redis_url=url, home=home), environ, group)


@pytest.fixture
def stack(settings: SettingsFactory, environ: dict[str, str], procs: Processes) -> TestStack:
    """Orchestrator and two pooled workers with the fake engine, for this test alone."""
    env = environ | {"MODM_WORKER__MODE": "pooled", "MODM_EMBEDDER": "fake"}
    return start_stack(settings(worker={"engine": "fake", "mode": "pooled"}), env, procs)
