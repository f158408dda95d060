"""`modm requests explain` of a real request of each kind, over HTTP, and the example of docs/beyond.md, which is its output.

With MODM_TEST_UPDATE_DOCS=1 the example is written into the page.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from typer.testing import CliRunner

from orchestrator.api import build_app
from orchestrator.auth import Gate
from orchestrator.cli_requests import requests_app
from orchestrator.service import Service
from tests.conftest import SettingsFactory
from tests.support.rig import FIRST, LARGE, OTHER, SECOND, SMALL, Rig, rigs

PAGE = Path(__file__).parents[2] / "docs" / "beyond.md"
EXAMPLE = re.compile(r"```console\n\$ modm requests explain .*?```", re.DOTALL)
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture
def rig(settings: SettingsFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Served on a real port, which the CLI talks to."""
    for make in rigs(settings):
        rig = make()
        app = build_app(Service, Gate.from_settings(rig.service.settings))  # type: ignore[arg-type]
        app.state.service = rig.service
        sock = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        monkeypatch.setenv("MODM_URL", f"http://127.0.0.1:{sock.getsockname()[1]}")
        yield rig
        server.should_exit = True
        thread.join(timeout=10)
        sock.close()


def told(request_id: str) -> str:
    result = CliRunner().invoke(requests_app, ["explain", request_id])
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(request_id: str) -> dict[str, str]:
    """The lines above the transitions by name."""
    above = told(request_id).partition("transitions\n")[0]
    return {line[:22].strip(): line[22:] for line in above.splitlines()}


def miss(rig: Rig) -> tuple[str, dict[str, str]]:
    request = rig.submit(OTHER)
    rig.draw(LARGE)
    return request, {"route": LARGE, "escalated": "no", "why": "miss: nothing of this size is cached"}


def hit(rig: Rig) -> tuple[str, dict[str, str]]:
    source = rig.submit(FIRST)
    rig.draw(LARGE)
    request = rig.submit(SECOND)
    rig.draw(SMALL)
    return request, {
        "route": SMALL,
        "source": source,
        "skipped steps k": "30",
        "verified against": "no floor is calibrated",
    }


def waited(rig: Rig) -> tuple[str, dict[str, str]]:
    source, request = rig.submit(FIRST), rig.submit(SECOND)
    assert rows(request)["waits on"] == source
    assert rows(source)["others wait on it"] == request
    rig.draw(LARGE)
    rig.draw(SMALL)
    return request, {"route": SMALL, "source": source, "waited on": source, "skipped steps k": "30"}


def rebound(rig: Rig) -> tuple[str, dict[str, str]]:
    source, request = (rig.submit(prompt, features="late-binding") for prompt in (FIRST, SECOND))
    assert rows(request)["position in queue"] == "1"
    rig.draw(LARGE)
    rig.draw(SMALL)
    return request, {"route": SMALL, "source": source, "skipped steps k": "30"}


def escalated(rig: Rig) -> tuple[str, dict[str, str]]:
    """One that waited before, so that everything is in it."""
    source, request = rig.submit(FIRST), rig.submit(SECOND, deadline_s=600)
    rig.draw(LARGE)
    rig.ledger.set_control(verify_floor=1.5, escalation_rate=1.0)
    rig.draw(SMALL)
    rig.draw(LARGE)
    first = "yes: scenes-small, 30 steps skipped, scored 1.0000"
    return request, {"route": LARGE, "waited on": source, "escalated": first, "model": "scenes-large"}


def stored(rig: Rig) -> tuple[str, dict[str, str]]:
    source = rig.submit(FIRST, seed=7)
    rig.draw(LARGE)
    return rig.submit(FIRST, seed=7), {"route": "stored", "source": source, "steps run": "0"}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (miss, "miss: "),
        (hit, "hit: similarity"),
        (waited, "after waiting (source done, predicted 0."),
        (rebound, "late binding: hit: similarity"),
        (escalated, "verify: score 1.0000 below 1.5000; before that after waiting (source done"),
        (stored, "exact repeat: same prompt, seed and size"),
    ],
)
def test_every_kind_of_request_is_explained(
    rig: Rig, make: Callable[[Rig], tuple[str, dict[str, str]]], why: str
) -> None:
    request, wanted = make(rig)
    found = rows(request)
    assert found["state"] == "done"
    assert found["why"].startswith(why)
    assert {name: found.get(name) for name in wanted} == wanted
    decision = rig.get(request).decision
    assert decision is not None
    for name, value in (("similarity", decision.similarity), ("predicted similarity", decision.predicted_similarity)):
        assert found.get(name) == (None if value is None else f"{value:.4f}")
    assert (make is miss) is (decision.similarity is None)
    assert (make in (waited, escalated)) is (decision.predicted_similarity is not None) is ("waited s" in found)


def test_the_example_of_the_page_is_what_the_command_prints(rig: Rig) -> None:
    request, _ = escalated(rig)
    text = f"$ modm requests explain {request}\n{told(request)}"
    names: dict[str, str] = {}
    text = UUID.sub(lambda m: names.setdefault(m[0], f"{len(names) + 1:08x}-3e0b-4d46-8f21-b7a4c0d5e9f3"), text)
    text = re.sub(r"\+ +\d+\.\d{3} s", "+   0.125 s", re.sub(r"(waited s +)\d+\.\d+", r"\g<1>0.125", text))
    page = PAGE.read_text(encoding="utf-8")
    made = EXAMPLE.sub(lambda _: f"```console\n{text}```", page)
    if os.environ.get("MODM_TEST_UPDATE_DOCS"):
        PAGE.write_text(made, encoding="utf-8")
    assert made == page
    assert EXAMPLE.search(page)
