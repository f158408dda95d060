"""What a trace is made of, whatever file it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from modm_tasks.errors import TraceError
from modm_tasks.messages import SubmitRequest


@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """One request. ``arrival_s`` counts from the start of the trace; None where the file has no times."""

    prompt: str
    arrival_s: float | None = None
    seed: int | None = None
    size: str | None = None
    client: str = ""
    num_inference_steps: int | None = None
    row: int = 0

    def request(self, **more: object) -> SubmitRequest:
        """As a submit. Raises pydantic's ValidationError, which `check` turns into a TraceError."""
        fields: dict[str, object] = {
            "prompt": self.prompt,
            "seed": self.seed,
            "size": self.size,
            "client": self.client,
            "num_inference_steps": self.num_inference_steps,
        }
        return SubmitRequest.model_validate(fields | more)


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that was left out, and why."""

    row: int
    field: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoadedTrace:
    """Rows in file order (or by time, where the format says so), with what was left out or filled in."""

    rows: tuple[TraceRow, ...]
    format: str
    skipped: tuple[BadRow, ...] = ()
    defaulted: dict[str, int] = field(default_factory=dict)


def check(row: TraceRow, file: str) -> TraceRow:
    """The same limits as at the HTTP API, at load time: a trace that would fail half-way does not start."""
    try:
        row.request()
    except ValidationError as error:
        first = error.errors()[0]
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise TraceError(reason, file=file, row=row.row, field=".".join(map(str, first["loc"]))) from error
    if row.arrival_s is not None and not (0 <= row.arrival_s < 1e10):
        raise TraceError("must be seconds from 0 on", file=file, row=row.row, field="arrival_s")
    return row


def collect(
    parse: Callable[[], Iterator[TraceRow | TraceError]],
    path: Path,
    format_name: str,
    *,
    start: int,
    num_requests: int | None,
    skip_bad_rows: bool,
    defaulted: dict[str, int] | None = None,
) -> LoadedTrace:
    """Check and slice a stream of rows. A bad row ends the load with its error, or is noted and left out."""
    rows: list[TraceRow] = []
    skipped: list[BadRow] = []
    stop = None if num_requests is None else start + num_requests
    for item in islice(_checked(parse(), path.name), start, stop):
        if isinstance(item, TraceError):
            if not skip_bad_rows:
                raise item
            skipped.append(BadRow(row=item.row or 0, field=item.field, reason=item.reason))
        else:
            rows.append(item)
    if not rows:
        raise TraceError(f"no rows from row {start + 1} on", file=path.name)
    return LoadedTrace(rows=tuple(rows), format=format_name, skipped=tuple(skipped), defaulted=defaulted or {})


def _checked(items: Iterable[TraceRow | TraceError], file: str) -> Iterator[TraceRow | TraceError]:
    for item in items:
        if isinstance(item, TraceRow):
            try:
                yield check(item, file)
            except TraceError as error:
                yield error
        else:
            yield item
