"""After the storm: is every accepted id in exactly one final state, with one image and one vector?"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict

from modm_tasks.client import Client
from modm_tasks.errors import ModmError, NotFoundError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import FINAL, RequestRecord, State


class Verdict(BaseModel):
    """Counts; every field but the first four has to be 0."""

    model_config = ConfigDict(frozen=True)

    accepted: int
    done: int
    poison_failed: int
    computed_twice: int
    lost: int
    failed: int
    doubled: int
    poison_wrong: int
    without_image: int
    without_vector: int
    wrong_payload: int
    extra_vectors: int
    idle_workers: int

    @property
    def clean(self) -> bool:
        return not any(
            getattr(self, name)
            for name in type(self).model_fields
            if name not in {"accepted", "done", "poison_failed", "computed_twice"}
        )


def verify(
    ledger: Ledger, client: Client, prompts: Mapping[str, str], *, poison: Iterable[str], damaged: set[str]
) -> Verdict:
    """``prompts``: id -> prompt of all accepted requests. ``damaged``: ids whose image the test itself broke."""
    poison = set(poison)
    records = {r.id: r for r in ledger.get_many(list(prompts))}
    done = {i: r for i, r in records.items() if r.state is State.DONE}
    failed = {i for i, r in records.items() if r.state is State.FAILED}
    attempts = {i: _moves(ledger, i, State.RUNNING) for i in records}
    vectors = {i: _entry(client, i) for i in done if i not in damaged}
    known = _vectors(client)
    return Verdict(
        accepted=len(prompts),
        done=len(done),
        poison_failed=len(failed & poison),
        computed_twice=sum(1 for i in done if attempts[i] > 1),
        lost=len(prompts) - sum(1 for r in records.values() if r.state in FINAL),
        failed=len(failed - poison),
        doubled=sum(1 for i in done if _moves(ledger, i, State.DONE) != 1),
        poison_wrong=sum(1 for i in poison if i not in failed or records[i].attempt != 3),
        without_image=sum(1 for i in done if i not in damaged and not _readable(client, i)),
        without_vector=sum(1 for entry in vectors.values() if entry is None),
        wrong_payload=sum(1 for i, e in vectors.items() if e is not None and not _matches(e, records[i], prompts[i])),
        extra_vectors=len(known - set(done)),
        idle_workers=sum(1 for w in client.get("/v1/workers") if not w["in_force"]),
    )


def _moves(ledger: Ledger, request_id: str, state: State) -> int:
    return sum(1 for _, name, _ in ledger.log(request_id) if name == state.value)


def _readable(client: Client, request_id: str) -> bool:
    try:
        Image.open(io.BytesIO(client.bytes(f"/v1/requests/{request_id}/image"))).load()
    except (ModmError, UnidentifiedImageError, OSError):
        return False
    return True


def _entry(client: Client, request_id: str) -> dict[str, object] | None:
    try:
        entry: dict[str, object] = client.get(f"/v1/cache/entries/{request_id}")
        return entry
    except NotFoundError:
        return None


def _matches(entry: Mapping[str, object], record: RequestRecord, prompt: str) -> bool:
    completion = record.completion
    return completion is not None and entry["prompt"] == prompt and entry["uri"] == completion.uri


def _vectors(client: Client) -> set[str]:
    found: set[str] = set()
    before: int | None = None
    while True:
        page = client.get("/v1/cache/entries", limit=1000, before_seq=before)
        found |= {str(e["id"]) for e in page["entries"]}
        before = page["next"]
        if before is None:
            return found
