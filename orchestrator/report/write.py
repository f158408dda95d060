"""Report folders: written aside and moved into place as a whole, so that a reader never finds half of one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modm_tasks.errors import InvalidInputError, NotFoundError
from modm_tasks.messages import RequestRecord
from orchestrator.report import html, plots
from orchestrator.report.build import is_hit

COLUMNS = (
    "id", "state", "route", "similarity", "skipped_steps", "source_id", "waits_on", "model", "steps_run", "gpu_s", "depth",
    "arrival_s", "accepted_s", "queued_s", "claimed_s", "done_s", "latency_s", "queue_wait_s", "clip_score", "attempt",
    "worker", "client", "seed", "prompt",
)  # fmt: skip


def row_of(record: RequestRecord) -> dict[str, Any]:
    """One line of requests.csv."""
    decision, done = record.decision, record.completion
    return {
        "id": record.id,
        "state": record.state.value,
        "route": decision.route.value if decision else None,
        "similarity": decision.similarity if decision else None,
        "skipped_steps": decision.skipped_steps if decision and is_hit(record) else 0,
        "source_id": decision.source_id if decision else None,
        "waits_on": decision.waits_on if decision else None,
        "model": done.model if done else None,
        "steps_run": done.steps_run if done else None,
        "gpu_s": done.gpu_s if done else None,
        "depth": done.depth if done else None,
        "latency_s": record.latency_s,
        "queue_wait_s": record.queue_wait_s,
        "client": record.request.client,
        "seed": done.seed if done else record.request.seed,
        "prompt": record.request.prompt,
    } | {
        name: getattr(record, name)
        for name in (
            *("arrival_s", "accepted_s", "queued_s", "claimed_s", "done_s"),
            *("clip_score", "attempt", "worker"),
        )
    }


def write_report(
    folder: Path, report: Mapping[str, Any], records: Sequence[RequestRecord], *, sheet: bytes | None = None
) -> Path:
    """report.json, requests.csv, per_minute.csv, plots/*.png, contact-sheet.png and index.html. Replaces the folder."""
    rows = [row_of(r) for r in records]
    latencies = {str(report["name"]): [r["latency_s"] for r in rows if r["latency_s"] is not None]}
    drawn = plots.all_plots([report], latencies)

    def fill(target: Path) -> None:
        _json(target / "report.json", report)
        _csv(target / "requests.csv", COLUMNS, rows)
        if report["per_minute"]:
            _csv(target / "per_minute.csv", tuple(report["per_minute"][0]), report["per_minute"])
        _pictures(target, drawn, sheet)
        page = html.page(
            f"MoDM run: {report['name']}", [report], drawn, sheets=_named(report, sheet), lead=summary(report)
        )
        (target / "index.html").write_text(page, encoding="utf-8")

    return _replace(folder, fill)


def write_comparison(
    folder: Path, reports: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any], *,
    latencies: Mapping[str, Sequence[float]], sheets: Mapping[str, bytes] | None = None, lead: str = "",
    title: str = "MoDM comparison",
) -> Path:  # fmt: skip
    """comparison.json, plots and index.html of several reports, into an existing or new folder. ``sheets``: the contact
    sheet of each run, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.all_plots(reports, latencies)
    _json(folder / "comparison.json", comparison)
    _pictures(folder, drawn)
    (folder / "index.html").write_text(html.page(title, reports, drawn, sheets=sheets, lead=lead), encoding="utf-8")
    return folder


def summary(report: Mapping[str, Any]) -> str:
    """One sentence."""
    requests = report["requests"]
    rate = report["served_per_min"]
    text = f"{requests['done']} of {requests['submitted']} requests done"
    if rate is not None:
        text += f", {rate:.1f} a minute"
    if report["hit_rate"]:
        text += f", {100 * report['hit_rate']:.0f} % refined from the cache"
    return text + f"; {requests['lost']} lost."


def read_report(folder: Path) -> dict[str, Any]:
    """A report folder's figures. Raises NotFoundError or InvalidInputError."""
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"no report in {folder}", field="DIR") from None
    except ValueError as error:
        raise InvalidInputError(f"{path}: is not JSON: {error}", field="DIR") from error
    missing = {"policy", "requests", "served_per_min", "latency_s"} - set(report if isinstance(report, dict) else ())
    if missing:
        raise InvalidInputError(f"{path}: field {min(missing)!r} is missing", field=min(missing))
    known: dict[str, Any] = report
    return known


def read_latencies(folder: Path) -> list[float]:
    """Latencies of requests.csv; none where the file is absent."""
    try:
        with (folder / "requests.csv").open(newline="", encoding="utf-8") as file:
            return [float(row["latency_s"]) for row in csv.DictReader(file) if row["latency_s"]]
    except FileNotFoundError:
        return []


def read_sheet(folder: Path) -> bytes | None:
    """The contact sheet of a report folder, if it has one."""
    path = folder / "contact-sheet.png"
    return path.read_bytes() if path.is_file() else None


def _named(report: Mapping[str, Any], sheet: bytes | None) -> dict[str, bytes]:
    return {} if sheet is None else {str(report["name"]): sheet}


def _pictures(target: Path, drawn: Mapping[str, bytes], sheet: bytes | None = None) -> None:
    (target / "plots").mkdir(exist_ok=True)
    for name, png in drawn.items():
        (target / "plots" / f"{name.lower().replace(':', '').replace(' ', '-')}.png").write_bytes(png)
    if sheet:
        (target / "contact-sheet.png").write_bytes(sheet)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Like rows as CSV; an empty file where there are none."""
    _csv(path, tuple(rows[0]) if rows else (), rows)


def _cell(value: Any) -> Any:
    """A prompt that starts like a formula gets an apostrophe, so that a spreadsheet shows it and does not run it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _replace(folder: Path, fill: Any) -> Path:
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fill(aside)
        os.chmod(aside, 0o755)
        if folder.exists():
            if any(folder.iterdir()) and not (folder / "report.json").exists():
                raise InvalidInputError(
                    f"{folder} holds something that is no report; choose another folder", field="report"
                )
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder
