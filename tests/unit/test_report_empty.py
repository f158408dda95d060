"""A run of which nothing came still has a whole report."""

from __future__ import annotations

import csv
from pathlib import Path

from modm_tasks.messages import RequestRecord, State, SubmitRequest, new_request_id
from orchestrator.report.build import build_report
from orchestrator.report.write import read_report, write_report


def test_every_request_refused(tmp_path: Path) -> None:
    report = build_report([], policy="modm", machine={}, settings={}, refused=3, large_latency_s=1.0)
    assert report["slo"]["violations_4x"] == 1.0
    write_report(tmp_path / "run", report, [])
    assert read_report(tmp_path / "run")["requests"]["refused"] == 3


def test_lost_requests_count_as_late_and_formulas_as_text(tmp_path: Path) -> None:
    records = [
        RequestRecord(
            id=new_request_id(), state=State.QUEUED, request=SubmitRequest(prompt="=HYPERLINK(1)"), arrival_s=5.0
        )
    ]
    report = build_report(records, policy="modm", machine={}, settings={}, lost=1, large_latency_s=1.0)
    assert report["requests"] == {"submitted": 1, "done": 0, "failed": 0, "refused": 0, "cancelled": 0, "lost": 1}
    assert report["slo"]["violations_2x"] == 1.0
    folder = write_report(tmp_path / "run", report, records)
    with (folder / "requests.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["prompt"] == "'=HYPERLINK(1)"
