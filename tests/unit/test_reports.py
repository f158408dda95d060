"""Figures worked by hand, the pages that show them, and that nothing of a user's becomes markup."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from modm_tasks.errors import InvalidInputError, NotFoundError
from modm_tasks.messages import Completion, Decision, RequestRecord, Route, State, SubmitRequest, new_request_id
from orchestrator.cli_report import report_app
from orchestrator.report import html, tables
from orchestrator.report.build import build_report, comparison
from orchestrator.report.contact_sheet import Pair, contact_sheet
from orchestrator.report.machine import describe
from orchestrator.report.plots import all_plots, role_timeline
from orchestrator.report.write import read_latencies, read_report, write_report

EVIL = "<script>alert('x')</script>"


def record(
    arrival: float, done: float | None, *, k: int = 0, state: State = State.DONE, gpu_s: float = 10.0
) -> RequestRecord:
    hit = k > 0
    decision = Decision(
        route=Route.SMALL_REFINE if hit else Route.LARGE_GEN, policy="modm", skipped_steps=k, similarity=0.8,
        source_id="s" if hit else None,
    )  # fmt: skip
    completion = Completion(
        uri="a", width=64, height=64, seed=1, model="small" if hit else "large", steps_run=50 - k, skipped_steps=k,
        depth=int(hit), gpu_s=gpu_s, vector="", embedder="e",
    )  # fmt: skip
    return RequestRecord(
        id=new_request_id(), state=state, request=SubmitRequest(prompt=EVIL), decision=decision,
        completion=completion if done is not None else None, arrival_s=arrival, accepted_s=arrival,
        claimed_s=arrival + 1, done_s=done, clip_score=0.5 if hit else 0.4,
    )  # fmt: skip


RECORDS = [record(0, 10), record(0, 30, k=25, gpu_s=2), record(10, 60, k=10, gpu_s=3), record(20, 120),
           record(30, 31, state=State.FAILED)]  # fmt: skip


def report(**more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"policy": "modm", "machine": {"cpu": "c"}, "settings": {"a": 1}, "refused": 1} | more
    return build_report(RECORDS, **given)


def test_figures_by_hand() -> None:
    made = report()
    assert made["requests"] == {"submitted": 6, "done": 4, "failed": 1, "refused": 1, "cancelled": 0, "lost": 0}
    assert made["served_per_min"] == pytest.approx(60 * 4 / 120)
    assert made["latency_s"]["mean"] == pytest.approx((10 + 30 + 50 + 100) / 4)
    assert made["latency_s"]["p50"] == pytest.approx(40)
    assert made["queue_wait_s"]["p99"] == pytest.approx(1)
    assert made["hit_rate"] == pytest.approx(2 / 5)
    assert made["skipped_steps"] == {"0": 3, "10": 1, "25": 1}
    # Large images took 10 s: over 20 s are 30, 50 and 100; failed and refused count too. Over 40 s are two of them.
    assert made["slo"] == {"large_latency_s": 10.0, "violations_2x": round(5 / 6, 4), "violations_4x": round(4 / 6, 4)}
    assert made["clip_score"] == {"mean": 0.45, "by_route": {"large-gen": 0.4, "small-refine": 0.5}}
    assert made["refined_by"] == {"small": 2}
    assert sum(row["done"] for row in made["per_minute"]) == 4
    assert json.loads(json.dumps(made)) == made


def test_predictions_of_waiting_requests_are_held_against_what_was_found() -> None:
    def waited(predicted: float, found: float, source: str | None) -> RequestRecord:
        one = record(0, 10)
        decision = one.decision
        assert decision is not None
        changes = {"predicted_similarity": predicted, "similarity": found, "source_id": source}
        return one.model_copy(update={"decision": decision.model_copy(update=changes)})

    records = [*RECORDS, waited(0.8, 0.83, "s"), waited(0.8, 0.79, None)]
    made = build_report(records, policy="modm", machine={}, settings={})
    assert made["prediction"] == {"waited": 2, "became_hits": 1, "bias": 0.01, "error": round((0.001 / 2) ** 0.5, 4)}
    assert report()["prediction"] == {"waited": 0, "became_hits": 0, "bias": None, "error": None}


def test_a_run_without_results_still_reports() -> None:
    made = build_report([], policy="modm", machine={}, settings={}, refused=3)
    assert made["served_per_min"] is None
    assert made["requests"]["submitted"] == 3
    assert tables.rows([made])


def test_comparison() -> None:
    base = report(policy="large-only") | {"served_per_min": 10.0}
    ours = report() | {"served_per_min": 25.0}
    figures = comparison(base, ours)
    assert figures["speedup"] == 2.5
    assert figures["clip_score_ratio"] == 1.0


def test_written_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # a second run replaces the first
        write_report(folder, report(name="a run"), RECORDS, sheet=contact_sheet([Pair(prompt="p", result=png())]))
    assert read_report(folder)["name"] == "a run"
    assert sorted(read_latencies(folder)) == [1.0, 10.0, 30.0, 50.0, 100.0]
    names = {p.name for p in folder.iterdir()}
    assert names == {"report.json", "requests.csv", "per_minute.csv", "plots", "contact-sheet.png", "index.html"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    page = (folder / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_report_never_replaces_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InvalidInputError, match="no report"):
        write_report(tmp_path / "mine", report(), RECORDS)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(NotFoundError):
        read_report(tmp_path / "nowhere")


def png(side: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, format="PNG")
    return out.getvalue()


def test_nothing_of_a_user_becomes_markup() -> None:
    page = html.page(EVIL, [report(name=EVIL)], {EVIL: png()}, lead=EVIL)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_contact_sheet_takes_any_prompt_and_size() -> None:
    pairs = [
        Pair(
            prompt=EVIL * 20 + "\n\x00\u202e", result=png(64), source=png(300), caption="k = 5", source_prompt="s " * 99
        ),
        Pair(prompt="", result=png(16)),
        Pair(prompt="日本語のプロンプト", result=png(64)),
    ]
    with Image.open(io.BytesIO(contact_sheet(pairs))) as sheet:
        assert sheet.width > 1000
        assert sheet.height > 300


def test_plots_and_roles() -> None:
    moves = [
        {"at_s": 1.0, "worker": "gpu0@h", "old": "large", "new": "small", "epoch": 1},
        {"at_s": 9.0, "worker": "gpu0@h", "old": "small", "new": "large", "epoch": 2},
    ]
    made = report(role_moves=moves)
    assert made["role_moves"] == 2
    plots = all_plots([made], {"modm": [1.0, 2.0]})
    assert "Roles over time: modm" in plots
    assert all(data.startswith(b"\x89PNG") for data in plots.values())
    assert role_timeline(report()) is None


def test_the_machine_is_named_without_host_or_paths() -> None:
    machine = describe()
    assert machine["cores"] >= 1
    assert "celery" in machine["versions"]
    assert "/" not in json.dumps(machine["versions"])


def test_commands(tmp_path: Path) -> None:
    run = CliRunner()
    for name, rate in (("a", 10.0), ("b", 30.0)):
        sheet = contact_sheet([Pair(prompt="p", result=png())])
        made = report(name=name, machine={"cpu": f"cpu of {name}"}) | {"served_per_min": rate}
        write_report(tmp_path / name, made, RECORDS, sheet=sheet)
    shown = run.invoke(report_app, ["show", str(tmp_path / "a"), "--json"])
    assert json.loads(shown.stdout)["name"] == "a"
    folders = [str(tmp_path / n) for n in ("a", "b")]
    compared = run.invoke(report_app, ["compare", *folders, "--output", str(tmp_path / "c"), "--json"])
    assert json.loads(compared.stdout)["speedup"] == 3.0
    page = (tmp_path / "c" / "index.html").read_text()
    for name in ("a", "b"):
        assert f"Contact sheet: {name}" in page
        assert f"cpu of {name}" in page
    for title in ("Latency", "Hit rate over time", "Skipped steps over time", "Unstarted requests over time"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert run.invoke(report_app, ["compare", folders[0]]).exit_code == 2
    assert run.invoke(report_app, ["show", str(tmp_path)]).exit_code == 1
