"""How `modm cache` looks on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from vector_store.progress import Progress


def mib(n_bytes: int | None) -> str:
    return "elsewhere" if n_bytes is None else f"{n_bytes / 2**20:.1f} MiB"


def one_line(text: str, width: int) -> str:
    """A prompt as a table cell: prompts are data, so control characters do not reach the terminal."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def stats(answer: Mapping[str, Any]) -> None:
    typer.echo(f"embedder   {answer['embedder']}, {answer['dim']} dimensions")
    typer.echo(f"eviction   {answer['eviction']}, {answer['capacity']} images a namespace, {answer['admission']} enter")
    typer.echo(f"codes      {answer['quantisation']}")
    typer.echo(f"images     {answer['files']} files, {mib(answer['image_bytes'])}")
    typer.echo(f"vectors    {mib(answer['vector_bytes'])}")
    if answer["hit_age_s"]:
        typer.echo("hit age    " + ", ".join(f"{k} {v:.0f} s" for k, v in answer["hit_age_s"].items()))
    for name, space in answer["namespaces"].items():
        rungs = ", ".join(f"k={k}: {n}" for k, n in space["hits_by_k"].items()) or "none"
        depths = ", ".join(f"{d}: {n}" for d, n in space["by_depth"].items())
        typer.echo(f"{name}: {space['images']} images, {space['hits']} hits ({rungs}); by depth {depths or 'none'}")
    for other in answer["other_embedders"]:
        typer.echo(f"of another embedder: {other} (`modm cache reindex`)")


def entry_header(*, similarity: bool = False) -> None:
    typer.echo(f"{'COSINE ' if similarity else ''}{'ID':36} {'SIZE':>9} {'DEPTH':>5} {'HITS':>5} {'MODEL':16} PROMPT")


def entries(rows: Sequence[Mapping[str, Any]], *, as_json: bool, similarity: bool = False) -> None:
    for row in rows:
        if as_json:
            typer.echo(json.dumps(row, ensure_ascii=False))
            continue
        first = f"{row['similarity']:6.4f} " if similarity else ""
        model, prompt = one_line(row["model"], 16), one_line(row["prompt"], 72)
        typer.echo(f"{first}{row['id']:36} {row['size']:>9} {row['depth']:>5} {row['hits']:>5} {model:16} {prompt}")


def verify(answer: Mapping[str, Any]) -> None:
    typer.echo(f"checked {answer['checked']} images: {'clean' if answer['clean'] else 'not clean'}")
    for key in (
        "vectors_without_file",
        "unreadable_files",
        "files_without_vector",
        "bad_vectors",
        "bad_entries",
        "wrong_dimension",
        "other_embedders",
    ):
        if answer[key]:
            more = f" and {len(answer[key]) - 3} more" if len(answer[key]) > 3 else ""
            typer.echo(f"{key.replace('_', ' ')}: {', '.join(answer[key][:3])}{more}")
    if answer["repaired"]:
        typer.echo(f"repaired {answer['repaired']}")


def simulation(rows: Sequence[Mapping[str, Any]]) -> None:
    typer.echo(f"{'POLICY':8} {'SIZE':>7} {'HIT RATE':>8} {'MEAN K':>6} {'GAP P50':>8} {'GAP P90':>8} {'REUSED':>7}")
    for row in rows:
        typer.echo(
            f"{row['policy']:8} {row['size']:>7} {row['hit_rate']:8.3f} {row['mean_k']:6.1f} {row['gap_p50']:8.0f} "
            f"{row['gap_p90']:8.0f} {row['reused_share']:7.3f}"
        )


#: Characters of a full progress bar.
BAR = 24


class ProgressLine:
    """A bar on stderr that is written over; nothing where stderr is not a terminal, but for the end without its bar."""

    def __init__(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        self._live = sys.stderr.isatty()
        self._last = ""

    def __call__(self, progress: Progress) -> None:
        left = "" if progress.left_s is None else f", {_clock(progress.left_s)} left"
        text = f"{self._what} {progress.done}/{progress.total}, {progress.per_s:.1f}/s{left}"
        self._write(text, progress.done, progress.total)

    def show(self, done: int, total: int) -> None:
        """Progress from plain counts."""
        per_s = done / max(1e-9, time.monotonic() - self._began)
        left = f", {_clock((total - done) / per_s)} left" if per_s > 0 else ""
        self._write(f"{self._what} {done}/{total}, {per_s:.1f}/s{left}", done, total)

    def _write(self, text: str, done: int, total: int) -> None:
        self._last = text
        if self._live:
            filled = BAR * done // max(1, total)
            sys.stderr.write(f"\r\x1b[K[{'#' * filled}{'.' * (BAR - filled)}] {text}")
            sys.stderr.flush()

    def end(self) -> None:
        if self._last:
            sys.stderr.write(("\r\x1b[K" if self._live else "") + self._last + "\n")
            sys.stderr.flush()


@contextmanager
def progress_line(what: str) -> Iterator[ProgressLine]:
    """A progress line that ends whatever happens."""
    line = ProgressLine(what)
    try:
        yield line
    finally:
        line.end()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
