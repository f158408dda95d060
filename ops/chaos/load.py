"""The load: users in a closed loop who never give up. A submit is repeated with its key until it is accepted."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from modm_tasks.client import Client
from modm_tasks.errors import ModmError, NotFoundError
from modm_tasks.messages import FINAL, State
from ops.chaos.traffic import body


@dataclass
class Tally:
    """What the users saw. ``poison`` are the ids whose prompt kills its worker, ``poison_again`` those that do so from their
    second drawing on; ``errors`` are answers that no outage explains.
    """

    accepted: list[str] = field(default_factory=list)
    poison: set[str] = field(default_factory=set)
    poison_again: set[str] = field(default_factory=set)
    prompts: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    sent: int = 0
    ended: int = 0
    outages: int = 0


class Load:
    """``users`` threads send prompts until ``enough(sent)`` says so."""

    def __init__(
        self,
        url: str,
        prompts: Sequence[str],
        *,
        users: int,
        enough: Callable[[int], bool],
        seed: int = 0,
        steps: int | None = None,
        picky: float | None = None,
    ) -> None:
        self.url, self.prompts = url, prompts
        self.users, self.enough, self.seed, self.steps, self.picky = users, enough, seed, steps, picky
        self.tally = Tally()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(self.users) as pool:
            for future in [pool.submit(self._user) for _ in range(self.users)]:
                future.result()

    def stop(self) -> None:
        self._stop.set()

    def _next(self) -> dict[str, Any] | None:
        with self._lock:
            number = self.tally.sent
            if self._stop.is_set() or self.enough(number):
                return None
            self.tally.sent += 1
            return body(number, self.prompts, seed=self.seed, picky=self.picky, steps=self.steps)

    def _user(self) -> None:
        with Client(self.url, patience_s=30.0) as client:
            while (wanted := self._next()) is not None:
                request_id = self._insist(client, wanted)
                if request_id is None:
                    return
                self._accepted(request_id, wanted["prompt"])
                self._await(client, request_id)

    def send(self, wanted: Mapping[str, Any], into: set[str] | None = None) -> str | None:
        """One request more, not waited for; None where the run has ended. ``into``: where its id is noted first."""
        with Client(self.url, patience_s=30.0) as client:
            request_id = self._insist(client, wanted)
        if request_id is not None:
            if into is not None:
                into.add(request_id)
            self._accepted(request_id, str(wanted["prompt"]))
        return request_id

    def _accepted(self, request_id: str, prompt: str) -> None:
        with self._lock:
            self.tally.accepted.append(request_id)
            self.tally.prompts[request_id] = prompt

    def _insist(self, client: Client, wanted: Mapping[str, Any]) -> str | None:
        key = {"Idempotency-Key": uuid.uuid4().hex}
        while not self._stop.is_set():
            try:
                return str(client.post("/v1/requests", json=wanted, headers=key)["id"])
            except ModmError as error:
                self._outage(error)
        return None

    def _await(self, client: Client, request_id: str) -> None:
        while not self._stop.is_set():
            try:
                if State(client.get(f"/v1/requests/{request_id}", wait_s=5)["state"]) in FINAL:
                    break
            except NotFoundError:
                return  # the count at the end finds it missing
            except ModmError as error:
                self._outage(error)
        with self._lock:
            self.tally.ended += 1

    def _outage(self, error: ModmError) -> None:
        with self._lock:
            self.tally.outages += 1
            if not error.retryable:
                self.tally.errors.append(f"{error.code}: {error}")
        self._stop.wait(0.2)
