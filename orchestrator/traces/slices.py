"""The reference's slices by name. Pure; source: facts, section C (T:752-774 of the reference code).

A run takes the rows of the slice; its warm-up takes the rows just before them. DiffusionDB, by time: the run starts at
row 50,000. MJHQ-30K: the last n/10 rows of each of the ten categories, category after category.
"""

from __future__ import annotations

from collections.abc import Sequence

from modm_tasks.errors import InvalidInputError

SLICES = ("reference", "reference-warm")
FIRST_ROW = 50_000
WARM_ROWS = 10_000
#: MJHQ's `reference-warm` has to know how long the run is that it precedes: the artifact's 1,000.
ARTIFACT_ROWS = 1_000


def by_time(slice_name: str | None, start: int, num_requests: int | None, warm_up: int) -> tuple[int, int | None]:
    """(first row, number of rows) of a trace in one order. ``num_requests`` counts the warm-up rows, which come first.

    Raises InvalidInputError for an unknown slice, or a warm-up that would begin before the trace.
    """
    check(slice_name)
    if slice_name is None:
        return start, num_requests
    if slice_name == "reference-warm":
        num_requests = WARM_ROWS if num_requests is None else num_requests
        first = FIRST_ROW + start - num_requests
    else:
        first = FIRST_ROW + start - warm_up
    if first < 0:
        raise InvalidInputError(f"only {FIRST_ROW + start} rows come before the slice", field="warm_up")
    return first, num_requests


def by_category(categories: Sequence[str], slice_name: str, num_requests: int | None, warm_up: int) -> list[int]:
    """Positions of MJHQ rows, warm-up first. ``num_requests`` counts the warm-up rows; None = every row.

    A number that ten does not divide gives the first categories one row more.
    """
    check(slice_name)
    places: dict[str, list[int]] = {}
    for place, category in enumerate(categories):
        places.setdefault(category, []).append(place)
    if slice_name == "reference-warm":
        count = WARM_ROWS if num_requests is None else num_requests
        return _take(places, count, _shares(ARTIFACT_ROWS, len(places)))
    run = len(categories) if num_requests is None else max(0, num_requests - warm_up)
    none_before = [0] * len(places)
    return [*_take(places, warm_up, _shares(run, len(places))), *_take(places, run, none_before)]


def check(slice_name: str | None) -> None:
    """Raises InvalidInputError for a name that is not in SLICES."""
    if slice_name is not None and slice_name not in SLICES:
        raise InvalidInputError(f"unknown slice {slice_name!r}; there are {', '.join(SLICES)}", field="slice")


def _take(places: dict[str, list[int]], count: int, before_end: Sequence[int]) -> list[int]:
    taken: list[int] = []
    for rows, share, before in zip(places.values(), _shares(count, len(places)), before_end, strict=True):
        end = max(0, len(rows) - before)
        taken += rows[max(0, end - share) : end]
    return taken


def _shares(count: int, parts: int) -> list[int]:
    base, extra = divmod(count, max(1, parts))
    return [base + (part < extra) for part in range(parts)]
