"""What a trace is made of, whatever file it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from modm_tasks.errors import TraceError
from modm_tasks.messages import SubmitRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRow:
    """One request. ``arrival_s`` counts from the start of the trace; None where the file has no times."""

    prompt: str
    arrival_s: float | None = None
    seed: int | None = None
    size: str | None = None
    client: str = ""
    num_inference_steps: int | None = None
    deadline_s: float | None = None
    row: int = 0

    def request(self, **more: object) -> SubmitRequest:
        """As a submit. Raises pydantic's ValidationError, which `check` turns into a TraceError."""
        fields: dict[str, object] = {
            "prompt": self.prompt,
            "seed": self.seed,
            "size": self.size,
            "client": self.client,
            "num_inference_steps": self.num_inference_steps,
            "deadline_s": self.deadline_s,
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


class TraceStream:
    """Rows one by one, checked and sliced; what was left out is in ``skipped`` once they have been read.

    A bad row ends the stream with its error, or with ``skip_bad_rows`` is noted and left out. A stream without any row
    is an error too. ``first`` is the first row wanted, of which ``parse`` passes over ``begun`` by itself.
    """

    def __init__(
        self,
        parse: Callable[[], Iterator[TraceRow | TraceError]],
        path: Path,
        format: str,
        *,
        first: int,
        begun: int,
        count: int | None,
        skip_bad_rows: bool,
        defaulted: dict[str, int],
    ) -> None:
        self.format, self.defaulted = format, defaulted
        self.skipped: list[BadRow] = []
        self._parse, self._file, self._skip = parse, path.name, skip_bad_rows
        self._first, self._begun, self._count = first, begun, count

    def __iter__(self) -> Iterator[TraceRow]:
        self.skipped.clear()
        self.defaulted.clear()
        any_row = False
        low = self._first - self._begun
        for item in islice(self._parse(), low, None if self._count is None else low + self._count):
            try:
                if isinstance(item, TraceError):
                    raise item
                row = check(item, self._file)
            except TraceError as error:
                if not self._skip:
                    raise
                self.skipped.append(BadRow(row=error.row or 0, field=error.field, reason=error.reason))
                continue
            any_row = True
            yield row
        if not any_row:
            raise TraceError(f"no rows from row {self._first + 1} on", file=self._file)
