"""`modm report show | compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modm_tasks.output import handle_errors, note, print_json, table

report_app = typer.Typer(no_args_is_help=True, help="Reports of runs.", rich_markup_mode=None)


@report_app.command("show")
@handle_errors
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `submit-trace --report` wrote.")],
    json: Annotated[bool, typer.Option("--json", help="report.json as it is.")] = False,
) -> None:
    """Print a report."""
    from orchestrator.report import tables
    from orchestrator.report.write import read_report

    report = read_report(folder)
    if json:
        print_json(report)
    else:
        table(["", *tables.names([report])], tables.rows([report]))


@report_app.command("compare")
@handle_errors
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Two or more report folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the page.")] = Path("comparison"),
    json: Annotated[bool, typer.Option("--json", help="The comparison as JSON.")] = False,
) -> None:
    """Print reports side by side and write one self-contained page. The first is the base of ratios."""
    from modm_tasks.errors import InvalidInputError
    from orchestrator.report import tables
    from orchestrator.report.build import comparison
    from orchestrator.report.write import read_latencies, read_report, read_sheet, write_comparison

    if len(folders) < 2:
        raise InvalidInputError("compare needs at least two folders", field="DIR")
    reports = [read_report(f) for f in folders]
    names = [n if tables.names(reports).count(n) == 1 else f"{n} ({f.name})"
             for n, f in zip(tables.names(reports), folders, strict=True)]  # fmt: skip
    reports = [r | {"name": n} for r, n in zip(reports, names, strict=True)]
    figures = comparison(reports[0], reports[-1])
    latencies = {n: read_latencies(f) for n, f in zip(names, folders, strict=True)}
    sheets = {n: sheet for n, f in zip(names, folders, strict=True) if (sheet := read_sheet(f)) is not None}
    write_comparison(output, reports, figures, latencies=latencies, sheets=sheets)
    if json:
        print_json(figures)
    else:
        table(["", *names], tables.rows(reports))
    note(f"page: {output / 'index.html'}")
