"""Writes what a run gave: report.json, per-minute CSV, per-request CSV, plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modm_tasks.errors import InvalidInputError
from orchestrator.report.plots import latency_cdf
from orchestrator.simulator import plots
from orchestrator.simulator.outcome import Outcome


def write_run(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Returns the report. Raises InvalidInputError where the folder cannot be written."""
    found = outcome.report()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_csv(folder / "per_minute.csv", outcome.per_minute())
        write_csv(folder / "per_request.csv", outcome.per_request())
        if outcome.ticks:
            write_csv(folder / "controller.csv", outcome.ticks)
        plots.of_run(outcome, folder)
    except OSError as error:
        raise InvalidInputError(f"cannot write {folder}: {error.strerror}", field="report") from error
    return found


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        if rows:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def write_comparison(found: Mapping[str, Any], latencies: Mapping[str, Sequence[float]], folder: Path) -> None:
    """report.json and latency_cdf.png of a validation. Raises InvalidInputError where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / "latency_cdf.png").write_bytes(latency_cdf(latencies))
    except OSError as error:
        raise InvalidInputError(f"cannot write {folder}: {error.strerror}", field="report") from error
