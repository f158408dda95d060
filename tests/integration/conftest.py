"""Fixtures that several files here share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modm_tasks.ledger import Ledger
from tests.conftest import SettingsFactory
from tests.support.cache import Served, make_cache
from vector_store.cache import ImageCache


@pytest.fixture
def ledger(settings: SettingsFactory) -> Iterator[Ledger]:
    made = Ledger.from_settings(settings())
    yield made
    made.redis.close()


@pytest.fixture(params=["edge:", "memory:"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ImageCache]:
    made = make_cache(tmp_path / "home", request.param)
    yield made
    made.close()


@pytest.fixture
def served(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """That cache's routes on a real port."""
    made = Served(cache, monkeypatch)
    yield made
    made.stop()
