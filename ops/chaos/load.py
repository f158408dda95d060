"""The load: users in a closed loop who never give up. A submit is repeated with its key until it is accepted."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from modm_tasks.client import Client
from modm_tasks.errors import ModmError, NotFoundError
from modm_tasks.messages import FINAL, State


@dataclass
class Tally:
    """What the users saw. ``poison`` are the ids whose prompt kills its worker."""

    accepted: list[str] = field(default_factory=list)
    poison: set[str] = field(default_factory=set)
    prompts: dict[str, str] = field(default_factory=dict)
    ended: int = 0
    outages: int = 0


class Load:
    """``users`` threads send prompts until ``enough()`` says so."""

    def __init__(
        self, url: str, prompts: Sequence[str], poison: Sequence[str], *, users: int, enough: Callable[[int], bool]
    ) -> None:
        self.url, self.prompts, self.poison = url, prompts, list(poison)
        self.users, self.enough = users, enough
        self.tally = Tally()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(self.users) as pool:
            for future in [pool.submit(self._user) for _ in range(self.users)]:
                future.result()

    def stop(self) -> None:
        self._stop.set()

    def _next(self) -> tuple[str, bool] | None:
        with self._lock:
            number = len(self.tally.prompts)
            if self._stop.is_set() or self.enough(number):
                return None
            # Poison comes spread over the run, one at a time.
            bad = bool(self.poison) and number % 40 == 20
            prompt = self.poison.pop() if bad else self.prompts[number % len(self.prompts)]
            self.tally.prompts[f"pending-{number}"] = prompt
            return prompt, bad

    def _user(self) -> None:
        with Client(self.url, patience_s=30.0) as client:
            while (work := self._next()) is not None:
                prompt, bad = work
                request_id = self._insist(client, prompt)
                if request_id is None:
                    return
                with self._lock:
                    self.tally.accepted.append(request_id)
                    self.tally.prompts[request_id] = prompt
                    if bad:
                        self.tally.poison.add(request_id)
                self._await(client, request_id)

    def _insist(self, client: Client, prompt: str) -> str | None:
        key = {"Idempotency-Key": uuid.uuid4().hex}
        while not self._stop.is_set():
            try:
                return str(client.post("/v1/requests", json={"prompt": prompt}, headers=key)["id"])
            except ModmError as error:
                self._outage(error)
        return None

    def _await(self, client: Client, request_id: str) -> None:
        while not self._stop.is_set():
            try:
                if State(client.get(f"/v1/requests/{request_id}", wait_s=5)["state"]) in FINAL:
                    break
            except ModmError as error:
                self._outage(error)
        with self._lock:
            self.tally.ended += 1

    def _outage(self, error: ModmError) -> None:
        if isinstance(error, NotFoundError) or not error.retryable:
            raise error
        with self._lock:
            self.tally.outages += 1
        self._stop.wait(0.2)
