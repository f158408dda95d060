"""The load: users in a closed loop who never give up. A submit is repeated with its key until it is accepted."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from modm_tasks.client import Client
from modm_tasks.errors import ModmError, NotFoundError
from modm_tasks.messages import FINAL, State

#: So many prompts come in turn; a multiple of 3, so that a seeded one is the same request each time.
PROMPTS = 60


@dataclass
class Tally:
    """What the users saw. ``poison`` are the ids whose prompt kills its worker; ``errors`` are answers that no outage
    explains.
    """

    accepted: list[str] = field(default_factory=list)
    poison: set[str] = field(default_factory=set)
    prompts: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    sent: int = 0
    ended: int = 0
    outages: int = 0


def body(number: int, prompt: str, seed: int) -> dict[str, Any]:
    """The ``number``-th submit: every third has a seed, so that its repeats are answered from the store."""
    if number % 3:
        return {"prompt": prompt}
    return {"prompt": prompt, "seed": random.Random(f"{seed}:{prompt}").randrange(2**31)}


class Load:
    """``users`` threads send prompts until ``enough(sent)`` says so."""

    def __init__(
        self,
        url: str,
        prompts: Sequence[str],
        poison: Sequence[str],
        *,
        users: int,
        enough: Callable[[int], bool],
        seed: int = 0,
        poison_every: int = 40,
    ) -> None:
        self.url, self.prompts, self.poison = url, prompts, list(poison)
        self.users, self.enough, self.seed, self.poison_every = users, enough, seed, poison_every
        self.tally = Tally()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(self.users) as pool:
            for future in [pool.submit(self._user) for _ in range(self.users)]:
                future.result()

    def stop(self) -> None:
        self._stop.set()

    def _next(self) -> tuple[dict[str, Any], bool] | None:
        with self._lock:
            number = self.tally.sent
            if self._stop.is_set() or self.enough(number):
                return None
            self.tally.sent += 1
            # Poison comes spread over the run, one at a time.
            if self.poison and number % self.poison_every == self.poison_every // 4:
                return {"prompt": self.poison.pop()}, True
            return body(number, self.prompts[number % min(PROMPTS, len(self.prompts))], self.seed), False

    def _user(self) -> None:
        with Client(self.url, patience_s=30.0) as client:
            while (work := self._next()) is not None:
                wanted, bad = work
                request_id = self._insist(client, wanted)
                if request_id is None:
                    return
                with self._lock:
                    self.tally.accepted.append(request_id)
                    self.tally.prompts[request_id] = wanted["prompt"]
                    if bad:
                        self.tally.poison.add(request_id)
                self._await(client, request_id)

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
