"""Live progress of a replay on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modm_tasks.output import interactive, note
from orchestrator.replay import Progress

EVERY_S = 10.0


@contextmanager
def shown(title: str) -> Iterator[Callable[[Progress], None]]:
    """A listener for `replay`."""
    if interactive():
        with _bar(title) as redraw:
            yield redraw
        return
    last = [time.monotonic()]

    def listener(progress: Progress) -> None:
        now = time.monotonic()
        if now - last[0] >= EVERY_S or progress.ended + progress.refused == progress.total:
            last[0] = now
            note(f"{title}: {_text(progress)}")

    yield listener


def _text(progress: Progress) -> str:
    text = (
        f"{progress.ended}/{progress.total} ended, {progress.served_per_min:.1f}/min, hit rate {progress.hit_rate:.2f}"
    )
    return text + (f", {progress.refused} refused" if progress.refused else "")


@contextmanager
def _bar(title: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, text="")

        def listener(progress: Progress) -> None:
            done = progress.ended + progress.refused
            bar.update(task, total=progress.total, completed=done, text=_text(progress))

        yield listener
