"""After the storm: is every accepted id in exactly one final state, with one image and one vector?

``gather`` asks the system, ``judge`` counts: the second is pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from modm_tasks.client import Client
from modm_tasks.errors import ModmError, NotFoundError
from modm_tasks.image_store import decode_image
from modm_tasks.ledger import Ledger
from modm_tasks.messages import FINAL, RequestRecord, Route, State
from modm_tasks.settings import Settings
from ops.chaos.mechanisms import Limits, Log, escalations, too_deep

#: Fields of the verdict that may be anything.
COUNTS = frozenset({"accepted", "done", "stored", "cancelled", "poison_failed", "damaged", "computed_twice"})


class Verdict(BaseModel):
    """Counts; every field that is not in COUNTS has to be 0."""

    model_config = ConfigDict(frozen=True)

    accepted: int
    done: int
    stored: int = 0
    cancelled: int = 0
    poison_failed: int
    damaged: int = 0
    computed_twice: int
    lost: int
    failed: int
    doubled: int
    accepted_twice: int = 0
    poison_wrong: int
    without_image: int
    without_vector: int
    wrong_payload: int
    extra_vectors: int
    idle_workers: int
    cancelled_unasked: int = 0
    too_deep: int = 0
    unrecovered: int = 0
    not_injected: int = 0
    not_exercised: int = 0
    growing: int = 0
    orphans: int = 0

    @property
    def missed(self) -> dict[str, int]:
        """What should be 0 and is not."""
        return {name: n for name, n in self.model_dump().items() if name not in COUNTS and n}

    @property
    def clean(self) -> bool:
        return not self.missed


class Seen(BaseModel):
    """What the system says at the end, by request id. ``known``: every id of the ledger, ours or not; ``logs``: the
    transitions of each request, in order; ``vectors``: the cache's entries; ``readable``: ids whose image opens.
    """

    model_config = ConfigDict(frozen=True)

    records: dict[str, RequestRecord]
    known: frozenset[str]
    logs: dict[str, Log]
    vectors: dict[str, dict[str, Any]]
    vector_rows: int
    readable: frozenset[str]


def gather(ledger: Ledger, client: Client, accepted: Sequence[str]) -> Seen:
    """Ask ledger, cache and image route. Raises ModmError."""
    records = {r.id: r for r in ledger.get_many(list(dict.fromkeys(accepted)))}
    done = [i for i, r in records.items() if r.state is State.DONE]
    rows = _entries(client)
    return Seen(
        records=records,
        known=frozenset(ledger.index("open", limit=1_000_000) + ledger.index("finished", limit=1_000_000)),
        logs={i: ledger.log(i) for i in records},
        vectors={str(row["id"]): row for row in rows},
        vector_rows=len(rows),
        readable=frozenset(i for i in done if _readable(client, i)),
    )


def judge(
    seen: Seen,
    *,
    prompts: Mapping[str, str],
    poison: Collection[str],
    damaged: Mapping[str, float],
    max_attempts: int,
    limits: Limits,
    poison_again: Collection[str] = (),
    cancelled: Collection[str] = (),
) -> Verdict:
    """``prompts``: id -> prompt of all accepted requests. ``damaged``: id -> when the run itself broke its image, Unix s.
    ``poison_again``: may fail, but need not. ``cancelled``: whose end the run asked for; some were done before that.
    """
    records = seen.records
    states = {i: [state for _, state, _ in log] for i, log in seen.logs.items()}
    ended = {i for i, r in records.items() if r.state is State.CANCELLED}
    done = {i for i, r in records.items() if r.state is State.DONE}
    failed = {i for i, r in records.items() if r.state is State.FAILED}
    stored = {i for i in done if _is_stored(records[i])}
    # A stored repeat shows another request's image, which may have been broken after the answer; before it, the system
    # should have seen that. A second's margin, because breaking and noting it are not one act.
    broken = set(damaged) | {
        i for i in stored if (records[i].done_s or 0.0) < damaged.get(_shown(records[i]) or "", 0.0) + 1.0
    }
    # A damaged image may have left the cache, by the check at an orchestrator's start.
    due = done - stored - set(damaged)
    finals = {i: sum(Counter(states[i])[state.value] for state in FINAL) for i in records}
    return Verdict(
        accepted=len(prompts),
        done=len(done),
        stored=len(stored),
        cancelled=len(ended & set(cancelled)),
        poison_failed=len(failed & (set(poison) | set(poison_again))),
        damaged=len(damaged),
        computed_twice=sum(1 for i in done if states[i].count(State.RUNNING.value) > 1 + escalations(seen.logs[i])),
        lost=sum(1 for i in prompts if i not in records or records[i].state not in FINAL),
        failed=len(failed - set(poison) - set(poison_again)),
        doubled=sum(1 for i in records if records[i].state in FINAL and finals[i] != 1),
        accepted_twice=len(seen.known - set(prompts)),
        poison_wrong=sum(1 for i in poison if i not in failed or records[i].attempt < max_attempts),
        without_image=len(done - broken - seen.readable),
        without_vector=len(due - set(seen.vectors)),
        wrong_payload=sum(1 for i in due & set(seen.vectors) if not _matches(seen.vectors[i], records[i], prompts[i])),
        extra_vectors=len(set(seen.vectors) - (done - stored)) + seen.vector_rows - len(seen.vectors),
        idle_workers=0,
        cancelled_unasked=len(ended - set(cancelled)),
        too_deep=too_deep(records, seen.logs, limits),
    )


def _is_stored(record: RequestRecord) -> bool:
    return record.decision is not None and record.decision.route is Route.STORED


def _shown(record: RequestRecord) -> str | None:
    return record.decision.source_id if record.decision is not None else None


def _readable(client: Client, request_id: str) -> bool:
    try:
        decode_image(client.bytes(f"/v1/requests/{request_id}/image"), formats=("PNG",))
    except ModmError:
        return False
    return True


def _matches(entry: Mapping[str, Any], record: RequestRecord, prompt: str) -> bool:
    completion = record.completion
    return completion is not None and entry["prompt"] == prompt and entry["uri"] == completion.uri


def _entries(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before: int | None = None
    while True:
        try:
            page = client.get("/v1/cache/entries", limit=1000, before_seq=before)
        except NotFoundError:  # nothing was ever cached
            return found
        found += page["entries"]
        before = page["next"]
        if before is None:
            return found


def idle_workers(settings: Settings, workers: Collection[str], *, into: list[str]) -> list[str]:
    """Those that consume no queue, or do not answer, as Celery itself says; also left in ``into``."""
    from orchestrator.controller.remote import RemoteControl

    remote = RemoteControl.from_settings(settings, timeout_s=3.0)
    try:
        queues = remote.active_queues(workers)
    except ModmError:
        queues = {}
    finally:
        remote.close()
    into[:] = [w for w in workers if not queues.get(w)]
    return into
