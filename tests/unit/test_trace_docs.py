"""Every example of docs/traces.md and docs/reports.md, run: the output on the page is the output of the command."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from modm_tasks.messages import Completion, Decision, RequestRecord, Route, State, SubmitRequest
from orchestrator.cli_report import report_app
from orchestrator.cli_trace import trace_app
from orchestrator.report.build import build_report

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
#: The page's own server; the test's listens on another port.
MIRROR = "http://127.0.0.1:8080"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    return [(kind, info.strip(), body) for kind, info, body in BLOCK.findall((ROOT / "docs" / page).read_text("utf-8"))]


def run(command: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.add_typer(trace_app, name="trace")
    app.add_typer(report_app, name="report")
    result = CliRunner().invoke(app, shlex.split(command.removeprefix("$ modm ")), env={"NO_COLOR": "1"})
    return result.exit_code, result.stdout, result.stderr


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """The test's own output is what counts."""


@contextmanager
def mirror(folder: Path) -> Iterator[str]:
    """URL of a server of this folder's files."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def finished(index: int, k: int) -> RequestRecord:
    """Two requests a minute; a large image takes 20 s, a refinement 5 s, on a worker that is free."""
    arrival_s, took_s = 1000.0 + 30 * index, 5.0 if k else 20.0
    decision = Decision(
        route=Route.SMALL_REFINE if k else Route.LARGE_GEN, policy="modm", skipped_steps=k,
        source_id="source" if k else None, similarity=0.8 if k else None,
    )  # fmt: skip
    completion = Completion(
        uri="image", width=64, height=64, seed=1, model="scenes-small" if k else "scenes-large", steps_run=50 - k,
        skipped_steps=k, depth=int(k > 0), gpu_s=took_s, vector="", embedder="scenes-clip",
    )  # fmt: skip
    return RequestRecord(
        id=f"{index:08d}-0000-4000-8000-000000000000", state=State.DONE, request=SubmitRequest(prompt=f"scene {index}"),
        decision=decision, completion=completion, arrival_s=arrival_s, accepted_s=arrival_s, claimed_s=arrival_s + 1,
        done_s=arrival_s + 1 + took_s, clip_score=0.71 if k else 0.7,
    )  # fmt: skip


def write_runs() -> None:
    for name, ks in (("large", [0] * 4), ("modm", [0, 25, 10, 25])):
        records = [finished(index, k) for index, k in enumerate(ks)]
        policy = "large-only" if name == "large" else "modm"
        Path(name).mkdir()
        report = build_report(records, policy=policy, machine={}, settings={})
        Path(name, "report.json").write_text(json.dumps(report), encoding="utf-8")


def shown_is_printed(
    kind: str, info: str, body: str, *, url: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> bool:
    """Write a block's file, or run its command; whether a command ran.

    What a failure, or a command that reports on stderr, prints there is shown too: ``exit=2``, ``all``.
    """
    if info.startswith("file="):
        Path(info.removeprefix("file=")).write_text(body, encoding="utf-8")
    if kind != "console" or (info == "real" and not SHARED.is_dir()):
        return False
    if info == "real":
        monkeypatch.chdir(ROOT)
    command, shown = body.split("\n", 1)
    code, out, err = run(command.replace(MIRROR, url))
    monkeypatch.chdir(folder)
    assert code == (2 if info == "exit=2" else 0), err
    printed = err if code else (err + out if info == "all" else out)
    assert [line.rstrip() for line in shown.splitlines()] == [line.rstrip() for line in printed.splitlines()], command
    return True


@pytest.mark.parametrize("page", ["traces.md", "reports.md"])
def test_the_page_shows_what_the_commands_print(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "reports.md":
        write_runs()
    with mirror(tmp_path) as url:
        ran = sum(shown_is_printed(*block, url=url, monkeypatch=monkeypatch, folder=tmp_path) for block in blocks(page))
    assert ran >= 2
    if page == "reports.md":
        assert Path("comparison/index.html").is_file()
