"""Did every mechanism that was on take part, and did the limits hold? Read from what the ledger wrote of each request.

A run in which nothing was ever drawn again says nothing about images that are kept as fallback. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from modm_tasks.messages import RequestRecord, Route, State

#: Transitions of one request: (Unix s, state, note), oldest first.
Log = Sequence[tuple[float, str, str]]


#: What only a fault brings about.
BY_FAULTS = frozenset(
    {"waited_on_a_cancelled_source", "waited_on_a_failed_source", "waiting_when_the_orchestrator_died",
     "answered_with_the_fallback"}
)  # fmt: skip


class Exercised(BaseModel):
    """Requests by what happened to them. Each has to be above 0 for the run to count."""

    model_config = ConfigDict(frozen=True)

    waited: int = 0
    refined_what_they_waited_for: int = 0
    waited_in_a_chain_at_its_limit: int = 0
    waited_on_a_cancelled_source: int = 0
    waited_on_a_failed_source: int = 0
    gave_up_waiting: int = 0
    waiting_when_the_orchestrator_died: int = 0
    rebound: int = 0
    answered_with_the_stored_image: int = 0
    varied_with_bounded_k: int = 0
    escalated: int = 0
    drawn_again: int = 0
    answered_with_the_fallback: int = 0
    refined_from_the_depth_limit: int = 0
    overtook_by_deadline: int = 0

    @property
    def never(self) -> list[str]:
        return [name for name, count in self.model_dump().items() if not count]


class Limits(BaseModel):
    """As the rig sets them."""

    model_config = ConfigDict(frozen=True)

    wait_depth: int
    max_depth: int


def exercised(
    records: Mapping[str, RequestRecord], logs: Mapping[str, Log], limits: Limits, *, waiting_at_death: int = 0
) -> Exercised:
    """Count. ``waiting_at_death``: seen by whoever killed the orchestrator."""
    notes = {i: [note for _, _, note in log] for i, log in logs.items()}

    def noted(*starts: str, having: str = "") -> int:
        return sum(any(n.startswith(starts) and having in n for n in lines) for lines in notes.values())

    done = [r for r in records.values() if r.state is State.DONE and r.decision is not None]
    chains = chain_depths(logs)
    escalated = {i for i, log in logs.items() if escalations(log)}
    fell_back = {i for i, lines in notes.items() if any(n.startswith("the refined image after all") for n in lines)}
    return Exercised(
        waited=len(chains),
        refined_what_they_waited_for=noted("after waiting (source done", having=": hit:"),
        waited_in_a_chain_at_its_limit=sum(depth == limits.wait_depth for depth in chains.values()),
        waited_on_a_cancelled_source=noted("after waiting (source cancelled"),
        waited_on_a_failed_source=noted("after waiting (source failed"),
        gave_up_waiting=noted(*(f"after waiting (source {s.value}" for s in (State.QUEUED, State.RUNNING, State.WAITING))),
        waiting_when_the_orchestrator_died=waiting_at_death,
        rebound=noted("late binding: "),
        answered_with_the_stored_image=sum(_route(r) is Route.STORED for r in done),
        varied_with_bounded_k=sum(any("bounded for variety" in n for n in lines) for lines in notes.values()),
        escalated=len(escalated),
        drawn_again=sum(r.id in escalated - fell_back for r in done),
        answered_with_the_fallback=len(fell_back),
        refined_from_the_depth_limit=sum(_source_depth(r) == limits.max_depth for r in done),
        overtook_by_deadline=len(overtakers(records, logs)),
    )  # fmt: skip


def too_deep(records: Mapping[str, RequestRecord], logs: Mapping[str, Log], limits: Limits) -> int:
    """Requests beyond a limit: refined from a source that was refined too often, or in too long a chain."""
    sources = {r.id for r in records.values() if _source_depth(r) > limits.max_depth}
    return len(sources | {i for i, depth in chain_depths(logs).items() if depth > limits.wait_depth})


def escalations(log: Log) -> int:
    """How often a refined image scored too low, so that it was drawn again."""
    return sum(note.startswith("verify: score") for _, _, note in log)


def chain_depths(logs: Mapping[str, Log]) -> dict[str, int]:
    """Of each request that waited, as it began to: 1 where its source did not wait then, 2 where that one's did not, ..."""
    waits = {i: span for i, log in logs.items() if (span := _wait(log)) is not None}
    depths: dict[str, int] = {}
    for request_id, (began, _, source) in waits.items():
        links = [request_id]
        while source not in links and (theirs := waits.get(source)) is not None and theirs[0] <= began < theirs[1]:
            links.append(source)
            source = theirs[2]
        depths[request_id] = len(links)
    return depths


def overtakers(records: Mapping[str, RequestRecord], logs: Mapping[str, Log]) -> set[str]:
    """Those that a worker took before an earlier one with more time, which stood in the same queue then."""
    spans = [(r, *span) for r in records.values() if (span := _first_in_queue(logs[r.id])) is not None]

    def passes(mine: RequestRecord, taken: float, route: Route) -> bool:
        return any(
            other.accepted_s < mine.accepted_s
            and queued < taken < then
            and theirs is route
            and _time(other) > _time(mine)
            for other, queued, then, theirs in spans
        )

    return {mine.id for mine, _, taken, route in spans if passes(mine, taken, route)}


def _wait(log: Log) -> tuple[float, float, str] | None:
    """From, until, source."""
    for place, (at, state, note) in enumerate(log):
        if state == State.WAITING.value:
            after = log[place + 1 :]
            return at, after[0][0] if after else float("inf"), note.removeprefix("on ")
    return None


def _first_in_queue(log: Log) -> tuple[float, float, Route] | None:
    """Queued, taken, queue. None where it was never taken, or moved between queues before."""
    for (at, state, note), (then, after, _) in pairwise(log):
        if state == State.QUEUED.value:
            route = Route.SMALL_REFINE if "hit: " in note else Route.LARGE_GEN
            return (at, then, route) if after == State.RUNNING.value else None
    return None


def _time(record: RequestRecord) -> float:
    return record.request.deadline_s or float("inf")


def _route(record: RequestRecord) -> Route | None:
    return None if record.decision is None else record.decision.route


def _source_depth(record: RequestRecord) -> int:
    """-1 where it was not refined from an image."""
    decision = record.decision
    return (
        -1
        if decision is None or decision.source_uri is None or _route(record) is Route.STORED
        else decision.source_depth
    )
