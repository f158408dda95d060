"""Loaders of published workloads. Schemas and their traps: docs/traces.md."""

from __future__ import annotations

import ast
import csv
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modm_tasks.errors import TraceError
from orchestrator.traces.rows import TraceRow
from orchestrator.traces.slices import by_category

Items = Iterator[TraceRow | TraceError]
BATCH_ROWS = 65_536
GATHER_ROWS = 250_000
#: Stands for no time, and sorts last.
NO_TIME = 2**63 - 1


def diffusiondb(path: Path, *, start: int = 0, stop: int | None = None) -> Items:
    """`metadata.parquet` from row ``start`` on, by time with file order among equals (stamps have minutes only; facts D1).

    A row without a time comes last, as in the reference. The first pass reads the time column alone (16 bytes a row) and
    finds the order; each further pass streams the text columns and keeps GATHER_ROWS rows, so that a whole file of any
    length is read in bounded memory, and a slice in one pass.
    """
    import pyarrow as pa

    try:
        yield from _diffusiondb(path, start, stop)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:  # a page may lie about itself
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise TraceError(f"is not Parquet: {line[:200]}", file=path.name) from error


def _diffusiondb(path: Path, start: int, stop: int | None) -> Items:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = set(file.schema_arrow.names)
    if missing := sorted({"prompt", "timestamp"} - names):
        raise TraceError("the column is missing", file=path.name, field=missing[0])
    if not pa.types.is_timestamp(file.schema_arrow.field("timestamp").type):
        raise TraceError("must be a timestamp column", file=path.name, field="timestamp")
    stamps = [
        np.where(batch.column(0).is_null(), NO_TIME, batch.column(0).cast(pa.int64()).fill_null(0))
        for batch in file.iter_batches(BATCH_ROWS, columns=["timestamp"])
    ]
    times = np.concatenate(stamps) if stamps else np.zeros(0, dtype=np.int64)
    order = np.argsort(times, kind="stable")
    unit = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[file.schema_arrow.field("timestamp").type.unit]
    first_s = float(times[order[0]]) / unit if len(order) else 0.0
    columns = [c for c in ("prompt", "seed", "user_name") if c in names]
    order = order[start:stop]
    for low in range(0, len(order), GATHER_ROWS):
        part = order[low : low + GATHER_ROWS]
        found: dict[int, TraceRow | TraceError] = {}
        for at, row in _rows_at(file, columns, part):
            arrival = None if times[at] == NO_TIME else max(0.0, float(times[at]) / unit - first_s)
            found[at] = _diffusiondb_row(path.name, at + 1, row, arrival)
        for at in part.tolist():
            yield found.pop(at)


def _rows_at(file: Any, columns: Sequence[str], places: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place, row) of the wanted places, in file order. Row groups that hold none of them are not read."""
    import numpy as np
    import pyarrow as pa

    wanted = np.sort(places)
    low = 0
    for group in range(file.num_row_groups):
        high = low + file.metadata.row_group(group).num_rows
        if np.searchsorted(wanted, low) == np.searchsorted(wanted, high):
            low = high
            continue
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
            first, last = np.searchsorted(wanted, [low, low + batch.num_rows])
            here = wanted[first:last]
            yield from zip(here.tolist(), batch.take(pa.array(here - low)).to_pylist(), strict=True)
            low += batch.num_rows


def _diffusiondb_row(file: str, number: int, row: dict[str, Any], arrival_s: float | None) -> TraceRow | TraceError:
    if not isinstance(row.get("prompt"), str):
        return TraceError("is missing", file=file, row=number, field="prompt")
    return TraceRow(
        prompt=row["prompt"], arrival_s=arrival_s, seed=row.get("seed"), client=str(row.get("user_name") or "")[:128],
        row=number,
    )  # fmt: skip


def mjhq(path: Path, *, slice_name: str | None = None, num_requests: int | None = None, warm_up: int = 0) -> Items:
    """`meta_data.json`: one object of 30,000 entries in file order, or a slice by category (`slices`); no times."""
    data = _json(path)
    if not isinstance(data, dict):
        raise TraceError("must be one JSON object", file=path.name)
    entries = list(data.items())
    places: Sequence[int] = range(len(entries))
    if slice_name is not None:
        categories = [str(entry.get("category") if isinstance(entry, dict) else "") for _, entry in entries]
        places = by_category(categories, slice_name, num_requests, warm_up)
    for place in places:
        (image_id, entry), number = entries[place], place + 1
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str):
            yield TraceError(f"of image {image_id[:40]!r} is missing", file=path.name, row=number, field="prompt")
        else:
            yield TraceRow(prompt=prompt, row=number)


def gentd26(path: Path, prompts: Sequence[str], defaulted: dict[str, int]) -> Items:
    """`lora_request_trace.csv`: arrivals, steps and images per prompt; prompts come from elsewhere, in order, repeated.

    A row asks for n images and becomes n rows of one arrival. Empty fields get the trace's commonest value and are
    counted in ``defaulted``: 25 published rows lack them and are real requests.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(line.replace("\0", "\ufffd") for line in file)
        try:
            names = set(reader.fieldnames or ())
        except csv.Error as error:
            raise TraceError(f"is not CSV: {error}", file=path.name, row=1) from error
        missing = {"gmt_create", "num_images_per_prompt", "num_inference_steps"} - names
        if missing:
            raise TraceError("the column is missing", file=path.name, field=min(missing))
        first: datetime | None = None
        for number, row in _csv_rows(path.name, reader):
            if isinstance(row, TraceError):
                yield row
                continue
            try:
                stamp = datetime.strptime(row["gmt_create"] or "", "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
            except ValueError:
                yield TraceError("must be YYYY-MM-DD HH:MM:SS", file=path.name, row=number, field="gmt_create")
                continue
            first = first or stamp
            numbers: dict[str, int] = {}
            bad: TraceError | None = None
            for name, default, top in (("num_images_per_prompt", 1, 64), ("num_inference_steps", 30, 1000)):
                text = (row.get(name) or "").strip()
                value = _whole(text) if text else default
                if value is None or not 1 <= value <= top:
                    bad = TraceError(f"must be a whole number from 1 to {top}", file=path.name, row=number, field=name)
                    break
                if not text:
                    defaulted[name] = defaulted.get(name, 0) + 1
                numbers[name] = value
            if bad is not None:
                yield bad
                continue
            for _ in range(numbers["num_images_per_prompt"]):
                yield TraceRow(
                    prompt=prompts[(number - 2) % len(prompts)],
                    arrival_s=max(0.0, (stamp - first).total_seconds()),
                    client=(row.get("groupId") or "")[:128],
                    num_inference_steps=numbers["num_inference_steps"],
                    row=number,
                )


def _csv_rows(file: str, reader: csv.DictReader[str]) -> Iterator[tuple[int, dict[str, str | None] | TraceError]]:
    """Rows with their line numbers; one that is no CSV is an error of its own."""
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, TraceError(f"is not CSV: {error}", file=file, row=reader.line_num)
        else:
            yield reader.line_num, row


def katz(path: Path, prompts: Sequence[str]) -> Items:
    """`diffusion_model_request_trace.json`: a list of requests, by time (stable); prompts come from elsewhere, in order."""
    data = _json(path)
    if not isinstance(data, list):
        raise TraceError("must be a JSON list", file=path.name)
    stamped: list[tuple[float, int, str]] = []
    for number, entry in enumerate(data, 1):
        stamp = _seconds(entry.get("timestamp")) if isinstance(entry, dict) else None
        if stamp is None:
            yield TraceError("must be a time", file=path.name, row=number, field="timestamp")
            continue
        stamped.append((stamp, number, str(entry.get("scene_id") or "")))
    del data
    stamped.sort(key=lambda item: item[0])
    for place, (stamp, number, scene) in enumerate(stamped):
        arrival_s = stamp - stamped[0][0]
        yield TraceRow(prompt=prompts[place % len(prompts)], arrival_s=arrival_s, client=scene, row=number)


def diffserve(path: Path, prompts: Sequence[str]) -> Items:
    """Lines ``arrival_ms,content_id``; the id indexes the file of prompts."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            parts = line.strip().split(",")
            arrival, content = _number(parts[0]), _whole(parts[1]) if len(parts) == 2 else None
            if arrival is None or arrival < 0:
                yield TraceError("must be milliseconds", file=path.name, row=number, field="arrival_ms")
            elif content is None or not 0 <= content < len(prompts):
                reason = f"must be 0 to {len(prompts) - 1}, the rows of the prompt file"
                yield TraceError(reason, file=path.name, row=number, field="content_id")
            else:
                yield TraceRow(prompt=prompts[content], arrival_s=arrival / 1000, row=number)


def vllm_omni(path: Path) -> Items:
    """Lines ``Request(prompt='...', width=..., height=...)``. Parsed as literals; nothing is evaluated."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _omni_row(path.name, number, line.strip())


def _omni_row(file: str, number: int, line: str) -> TraceRow | TraceError:
    try:
        with warnings.catch_warnings():  # a prompt with a backslash is the trace's affair, not the user's
            warnings.simplefilter("ignore")
            call = ast.parse(line, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "Request":
            return TraceError("must be Request(...)", file=file, row=number)
        values = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return TraceError("must be Request(...) with plain values", file=file, row=number)
    if not isinstance(values.get("prompt"), str):
        return TraceError("is missing", file=file, row=number, field="prompt")
    width, height = values.get("width"), values.get("height")
    size = f"{width}x{height}" if width is not None and height is not None else None
    seed, steps = values.get("seed"), values.get("num_inference_steps")
    for name, value in (("seed", seed), ("num_inference_steps", steps)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            return TraceError("must be a whole number", file=file, row=number, field=name)
    return TraceRow(prompt=values["prompt"], size=size, seed=seed, num_inference_steps=steps, row=number)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise TraceError(f"is not JSON: {str(error)[:120]}", file=path.name) from error


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(text: str) -> int | None:
    value = _number(text)
    return None if value is None or value != int(value) else int(value)


def _seconds(value: object) -> float | None:
    """A time as number (seconds, or milliseconds when it is that large) or ISO text."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        if not abs(value) < 1e18:  # not a time; NaN and Infinity end here too
            return None
        return float(value) / 1000 if value > 1e11 else float(value)
    try:
        stamp = datetime.fromisoformat(str(value))
    except ValueError:
        number = _number(str(value))
        return None if number is None else _seconds(number)
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
