"""`modm trace inspect | convert | fetch`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modm_tasks.errors import InvalidInputError
from modm_tasks.output import handle_errors, note, print_json

if TYPE_CHECKING:
    from orchestrator.traces.rows import LoadedTrace, TraceStream

trace_app = typer.Typer(no_args_is_help=True, help="Workloads.", rich_markup_mode=None)
File = Annotated[Path, typer.Argument(metavar="FILE", help="A trace in any format that submit-trace reads.")]
Format = Annotated[str | None, typer.Option("--format", help="Trace format; default: detected.")]
Prompts = Annotated[Path | None, typer.Option(help="Prompts for traces that have none.")]
Start = Annotated[int, typer.Option(min=0, help="Rows to pass over.")]
Number = Annotated[int | None, typer.Option("--num-requests", min=1, help="At most so many rows.")]
Slice = Annotated[str | None, typer.Option("--slice", help="reference | reference-warm")]
Skip = Annotated[bool, typer.Option(help="Count malformed rows instead of stopping.")]


@trace_app.command()
@handle_errors
def inspect(
    file: File,
    format: Format = None,
    prompts: Prompts = None,
    start: Start = 0,
    num_requests: Number = None,
    slice_name: Slice = None,
    skip_bad_rows: Skip = False,
    embeddings: Annotated[Path | None, typer.Option(help=".npy of unit text vectors, row for row.")] = None,
    embedder: Annotated[
        str | None, typer.Option(help="Embed the prompts with this instead: a name, or a text model's folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the rate over time.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Counts, rate over time, repetition, and how similar prompts are to earlier ones."""
    from orchestrator.traces.inspect import Summary, rate_plot, similarity_figures
    from orchestrator.traces.load import load_trace, stream_trace
    from orchestrator.traces.rows import LoadedTrace
    from orchestrator.traces.vectors import text_vectors

    # Similarity needs every prompt at once; all else is read row by row.
    whole = embeddings is not None or embedder is not None
    load: Callable[..., LoadedTrace | TraceStream] = load_trace if whole else stream_trace
    trace = load(
        file, format=format, start=start, num_requests=num_requests, slice_name=slice_name, prompts=prompts,
        skip_bad_rows=skip_bad_rows,
    )  # fmt: skip
    summary = Summary(trace)
    figures = summary.figures()
    if isinstance(trace, LoadedTrace):
        if embeddings is not None and (trace.skipped or slice_name):
            raise InvalidInputError(
                "vectors are row for row: they fit neither a slice nor left-out rows", field="embeddings"
            )
        vectors = text_vectors([r.prompt for r in trace.rows], embeddings=embeddings, embedder=embedder, start=start)
        if vectors is not None:
            figures |= similarity_figures(vectors)
    if plot is not None:
        if not plot.absolute().parent.is_dir():
            raise InvalidInputError(f"no folder {plot.parent}", field="plot")
        plot.write_bytes(rate_plot(summary.times))
        note(f"plot: {plot}")
    if json:
        print_json(figures)
        return
    for name, value in figures.items():
        typer.echo(f"{name:<32}{value}")


@trace_app.command()
@handle_errors
def convert(
    file: File,
    output: Annotated[Path, typer.Argument(help="JSONL to write.")],
    format: Format = None,
    prompts: Prompts = None,
    start: Start = 0,
    num_requests: Number = None,
    slice_name: Slice = None,
    skip_bad_rows: Skip = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Write a trace as JSONL, the format that every tool here reads."""
    from orchestrator.traces.inspect import write_jsonl
    from orchestrator.traces.load import stream_trace

    if not output.absolute().parent.is_dir():
        raise InvalidInputError(f"no folder {output.parent}", field="output")
    rows = stream_trace(
        file, format=format, start=start, num_requests=num_requests, slice_name=slice_name, prompts=prompts,
        skip_bad_rows=skip_bad_rows,
    )  # fmt: skip
    written = write_jsonl(rows, output)
    for name, count in rows.defaulted.items():
        note(f"{count} rows have no {name}; filled in")
    if rows.skipped:
        note(f"{len(rows.skipped)} malformed rows left out")
    if json:
        print_json({"rows": written, "malformed": len(rows.skipped), "defaulted": rows.defaulted, "file": str(output)})
    else:
        typer.echo(f"{written} rows in {output}")


@trace_app.command()
@handle_errors
def fetch(
    dataset: Annotated[str, typer.Argument(help="diffusiondb | mjhq")],
    directory: Annotated[Path, typer.Option("--directory", "-d", help="Where it goes.")] = Path(),
    url: Annotated[str | None, typer.Option(help="Another place that has the file.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Checksum that the file must have.")] = None,
) -> None:
    """Download published metadata; goes on where it stopped."""
    from orchestrator.traces.fetch import fetch_dataset

    typer.echo(str(fetch_dataset(dataset, directory, url=url, sha256=sha256)))
