"""Which loader reads which file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from modm_tasks.errors import InvalidInputError, TraceError
from orchestrator.traces.datasets import diffserve, diffusiondb, gentd26, katz, mjhq, vllm_omni
from orchestrator.traces.rows import LoadedTrace, TraceRow, TraceStream
from orchestrator.traces.slices import by_time

Items = Iterator[TraceRow | TraceError]
FORMATS = ("jsonl", "text", "diffusiondb", "mjhq", "gentd26", "katz", "diffserve", "vllm-omni")
#: Formats without prompt text, which have to be joined with a file of prompts.
NEED_PROMPTS = frozenset({"gentd26", "katz", "diffserve"})
FIELDS = frozenset({"prompt", "arrival_s", "seed", "size", "client", "num_inference_steps", "deadline_s"})


def detect_format(path: Path) -> str:
    """Guess by name and first bytes. Raises TraceError where that tells nothing."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "diffusiondb"
    if name.endswith(".jsonl"):
        return "jsonl"
    try:
        with path.open("rb") as file:
            head = file.read(4096).decode("utf-8", "replace").lstrip("\ufeff").lstrip()
    except OSError as error:
        raise TraceError(error.strerror or str(error), file=str(path)) from error
    if name.endswith(".csv") or head.startswith("gmt_create,"):
        return "gentd26"
    if head.startswith("["):
        return "katz"
    if head.startswith("{"):
        return "mjhq" if '"category"' in head else "jsonl"
    if head.startswith("Request("):
        return "vllm-omni"
    first = head.splitlines()[0].split(",") if head else []
    if len(first) == 2 and all(part.strip().replace(".", "", 1).isdigit() for part in first):
        return "diffserve"
    return "text"


def load_trace(
    path: Path,
    *,
    format: str | None = None,
    start: int = 0,
    num_requests: int | None = None,
    slice_name: str | None = None,
    prompts: Path | None = None,
    skip_bad_rows: bool = False,
    warm_up: int = 0,
) -> LoadedTrace:
    """Read a trace. Raises TraceError that names file, row and field, or InvalidInputError for a bad option.

    The first ``warm_up`` of ``num_requests`` rows are for warming up: a named slice then begins that much earlier.
    """
    stream = stream_trace(
        path, format=format, start=start, num_requests=num_requests, slice_name=slice_name, prompts=prompts,
        skip_bad_rows=skip_bad_rows, warm_up=warm_up,
    )  # fmt: skip
    rows = tuple(stream)
    return LoadedTrace(rows=rows, format=stream.format, skipped=tuple(stream.skipped), defaulted=stream.defaulted)


def stream_trace(
    path: Path,
    *,
    format: str | None = None,
    start: int = 0,
    num_requests: int | None = None,
    slice_name: str | None = None,
    prompts: Path | None = None,
    skip_bad_rows: bool = False,
    warm_up: int = 0,
) -> TraceStream:
    """As `load_trace`, one row at a time: for traces that should not be held in memory."""
    if not path.is_file():
        raise TraceError("there is no such file", file=str(path))
    name = format or detect_format(path)
    if name not in FORMATS:
        raise InvalidInputError(f"unknown trace format {name!r}; there are {', '.join(FORMATS)}", field="format")
    first, count = by_time(slice_name, start, num_requests, warm_up)
    begun = 0  # rows that the loader itself passes over
    if name == "mjhq" and slice_name is not None:
        first, count = start, None
    elif name == "diffusiondb":
        begun = first
    if name in NEED_PROMPTS and prompts is None:
        raise InvalidInputError(f"a {name} trace has no prompt text: give --prompts FILE", field="prompts")
    texts = read_prompts(prompts) if prompts is not None else ()
    defaulted: dict[str, int] = {}
    parsers: dict[str, Callable[[], Items]] = {
        "jsonl": partial(_jsonl, path),
        "text": partial(_text, path),
        "diffusiondb": partial(diffusiondb, path, start=first, stop=None if count is None else first + count),
        "mjhq": partial(mjhq, path, slice_name=slice_name, num_requests=num_requests, warm_up=warm_up),
        "gentd26": partial(gentd26, path, texts, defaulted),
        "katz": partial(katz, path, texts),
        "diffserve": partial(diffserve, path, texts),
        "vllm-omni": partial(vllm_omni, path),
    }
    return TraceStream(
        parsers[name],
        path,
        name,
        first=first,
        begun=begun,
        count=count,
        skip_bad_rows=skip_bad_rows,
        defaulted=defaulted,
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts to join with: the prompts of any trace that has some. Raises TraceError."""
    rows = load_trace(path).rows
    return tuple(row.prompt for row in rows)


def _lines(path: Path) -> Iterator[tuple[int, str | TraceError]]:
    """Non-empty lines, numbered from 1. A line that is not UTF-8 is an error of its own, not of the file."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8").lstrip("\ufeff").strip()
            except UnicodeDecodeError:
                yield number, TraceError("is not UTF-8 text", file=path.name, row=number)
                continue
            if line:
                yield number, line


def _text(path: Path) -> Items:
    for number, line in _lines(path):
        yield line if isinstance(line, TraceError) else TraceRow(prompt=line, row=number)


def _jsonl(path: Path) -> Items:
    for number, line in _lines(path):
        yield line if isinstance(line, TraceError) else _json_row(path.name, number, line)


def _json_row(file: str, number: int, line: str) -> TraceRow | TraceError:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        return TraceError(f"is not JSON: {error}", file=file, row=number)
    if not isinstance(data, dict):
        return TraceError("must be a JSON object", file=file, row=number)
    if data.get("prompt") is None:
        return TraceError("is missing", file=file, row=number, field="prompt")
    kinds: dict[str, tuple[type, ...]] = {
        "prompt": (str,), "arrival_s": (int, float), "seed": (int,), "size": (str,), "client": (str,),
        "num_inference_steps": (int,), "deadline_s": (int, float),
    }  # fmt: skip
    for name, kind in kinds.items():
        value = data.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return TraceError(f"must be {' or '.join(k.__name__ for k in kind)}", file=file, row=number, field=name)
    if unknown := sorted(set(data) - FIELDS):
        return TraceError(f"is unknown; there are {', '.join(sorted(FIELDS))}", file=file, row=number, field=unknown[0])
    known = {k: v for k, v in data.items() if v is not None}
    return TraceRow(row=number, **known)
