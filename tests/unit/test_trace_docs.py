"""Every example of docs/traces.md and docs/reports.md, run: the output on the page is the output of the command."""

from __future__ import annotations

import json
import re
import shlex
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
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    return [(kind, info.strip(), body) for kind, info, body in BLOCK.findall((ROOT / "docs" / page).read_text("utf-8"))]


def run(command: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.add_typer(trace_app, name="trace")
    app.add_typer(report_app, name="report")
    result = CliRunner().invoke(app, shlex.split(command.removeprefix("$ modm ")), env={"NO_COLOR": "1"})
    return result.exit_code, result.stdout, result.stderr


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


@pytest.mark.parametrize("page", ["traces.md", "reports.md"])
def test_the_page_shows_what_the_commands_print(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    if page == "reports.md":
        write_runs()
    for kind, info, body in blocks(page):
        if info.startswith("file="):
            Path(info.removeprefix("file=")).write_text(body, encoding="utf-8")
        if kind != "console" or (info == "real" and not SHARED.is_dir()):
            continue
        if info == "real":
            monkeypatch.chdir(ROOT)
        command, shown = body.split("\n", 1)
        code, out, err = run(command)
        monkeypatch.chdir(tmp_path)
        ran += 1
        assert code == (2 if info == "exit=2" else 0), err
        printed = err if code else out
        assert [line.rstrip() for line in shown.splitlines()] == [line.rstrip() for line in printed.splitlines()], (
            command
        )
    assert ran >= 2
    if page == "reports.md":
        assert Path("comparison/index.html").is_file()
