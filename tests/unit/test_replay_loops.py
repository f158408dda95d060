"""Open and closed loops against a target in this process that serves one request at a time."""

from __future__ import annotations

import _thread
import threading
import time
from collections import Counter

import pytest

from modm_tasks.errors import InvalidInputError, NotFoundError, RefusedError, UnavailableError
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest, new_request_id
from orchestrator import replay as loops
from orchestrator.replay import Progress, ReplayPlan, replay, warm_up
from orchestrator.traces.rows import TraceRow

ROWS = [TraceRow(prompt=f"p{i}", row=i + 1) for i in range(30)]


class Served:
    """Finishes requests in order of submission, one every ``service_s``; prompts in ``refuse`` get a 429."""

    def __init__(self, service_s: float = 0.0, *, refuse: frozenset[str] = frozenset()) -> None:
        self.service_s, self.refuse = service_s, refuse
        self.lock = threading.Lock()
        self.requests: list[SubmitRequest] = []
        self.ends: dict[str, float] = {}
        self.records: dict[str, RequestRecord] = {}
        self.ended: dict[str, threading.Event] = {}
        self.open = self.most_open = 0
        self.outages = 0
        self.forgotten: set[str] = set()
        self.never: set[str] = set()

    def submit(self, request: SubmitRequest) -> RequestRecord:
        with self.lock:
            if self.outages:
                self.outages -= 1
                raise UnavailableError
            if request.prompt in self.refuse:
                raise RefusedError("too many", retry_after_s=0.0)
            now = time.time()
            record = RequestRecord(
                id=new_request_id(), state=State.QUEUED, request=request, accepted_s=now,
                arrival_s=now if request.arrival_s is None else request.arrival_s,
            )  # fmt: skip
            self.ends[record.id] = max([now, *self.ends.values()]) + self.service_s
            self.records[record.id] = record
            self.ended[record.id] = threading.Event()
            self.requests.append(request)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        if request.prompt not in self.never:
            timer = threading.Timer(max(0.0, self.ends[record.id] - time.time()), self._finish, [record.id])
            timer.daemon = True
            timer.start()
        return record

    def _finish(self, request_id: str) -> None:
        with self.lock:
            self.open -= 1
            done_s = self.ends[request_id]
            decision = Decision(route=Route.SMALL_REFINE, policy="modm", source_id="s", skipped_steps=25)
            changes = {"state": State.DONE, "done_s": done_s, "admitted_s": done_s, "decision": decision}
            self.records[request_id] = self.records[request_id].model_copy(update=changes)
        self.ended[request_id].set()

    def wait(self, request_id: str, timeout_s: float, *, admitted: bool = False) -> RequestRecord:
        prompt = self.records[request_id].request.prompt
        if prompt in self.forgotten:
            raise NotFoundError
        self.ended[request_id].wait(min(timeout_s, 0.01) if prompt in self.never else timeout_s)
        return self.records[request_id]


def test_a_closed_loop_keeps_so_many_requests_open_and_the_order_of_the_trace() -> None:
    target = Served(0.01)
    result = replay(target, ROWS, ReplayPlan(concurrency=3, fields={"policy": "modm", "namespace": "n"}))
    assert [r.request.prompt for r in result.records] == [r.prompt for r in ROWS]
    assert {r.state for r in result.records} == {State.DONE}
    assert target.most_open == 3
    assert {(r.policy, r.namespace, r.arrival_s) for r in target.requests} == {("modm", "n", None)}
    assert (result.refused, result.lost, result.interrupted) == (0, 0, False)


def test_an_open_loop_sends_at_intended_times_however_slow_the_target_is() -> None:
    target = Served(0.02)
    arrivals = [0.005 * i for i in range(30)]
    result = replay(target, ROWS, ReplayPlan(arrivals_s=arrivals))
    first = result.records[0].arrival_s
    assert [r.arrival_s - first for r in result.records] == pytest.approx(arrivals, abs=1e-4)
    assert target.most_open > 8  # it does not wait for answers
    latencies = [r.latency_s or 0.0 for r in result.records]
    assert latencies[-1] > 0.3  # waiting counts from the intended arrival


def test_rows_out_of_order_are_sent_by_time_and_reported_by_row() -> None:
    target = Served()
    result = replay(target, ROWS[:3], ReplayPlan(arrivals_s=[0.6, 0.0, 0.3]))
    assert [r.prompt for r in target.requests] == ["p1", "p2", "p0"]
    assert [r.request.prompt for r in result.records] == ["p0", "p1", "p2"]


def test_progress_of_an_open_loop_counts_while_it_still_sends() -> None:
    seen: list[tuple[int, int]] = []

    def listener(progress: Progress) -> None:
        seen.append((progress.submitted, progress.ended))

    replay(Served(), ROWS, ReplayPlan(arrivals_s=[0.02 * i for i in range(30)]), listener)
    assert any(ended > 0 and submitted < 30 for submitted, ended in seen)
    assert max(seen) == (30, 30)


@pytest.mark.parametrize("arrivals", [None, [0.0] * 30])
def test_a_refusal_is_recorded_and_not_repeated(arrivals: list[float] | None) -> None:
    target = Served(refuse=frozenset({"p3", "p4"}))
    result = replay(target, ROWS, ReplayPlan(arrivals_s=arrivals, concurrency=2))
    assert (result.refused, len(result.records), len(result.errors)) == (2, 28, 2)


@pytest.mark.parametrize("arrivals", [None, [0.0] * 30])
def test_what_never_ends_or_is_forgotten_is_lost(arrivals: list[float] | None) -> None:
    target = Served()
    target.forgotten, target.never = {"p1"}, {"p2"}
    result = replay(target, ROWS, ReplayPlan(arrivals_s=arrivals, concurrency=2, give_up_s=0.2))
    assert (result.lost, len(result.records)) == (2, 30)
    assert Counter(r.state for r in result.records) == {State.DONE: 28, State.QUEUED: 2}


def test_an_outage_is_waited_out_with_the_same_key_and_a_long_one_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Served()
    target.outages = 1
    assert len(replay(target, ROWS[:2], ReplayPlan()).records) == 2
    assert len({r.idempotency_key for r in target.requests}) == 2
    monkeypatch.setattr(loops, "UNAVAILABLE_S", 0.2)
    target.outages = 10**6
    with pytest.raises(UnavailableError):
        replay(target, ROWS[:2], ReplayPlan())


def test_a_users_mistake_ends_the_run() -> None:
    class Strict(Served):
        def submit(self, request: SubmitRequest) -> RequestRecord:
            raise InvalidInputError("unknown policy", field="policy")

    with pytest.raises(InvalidInputError, match="unknown policy"):
        replay(Strict(), ROWS, ReplayPlan(arrivals_s=[0.0] * 30))


@pytest.mark.parametrize("arrivals", [None, [0.0, 0.0, *[60.0] * 28]])
def test_ctrl_c_returns_what_is_known(arrivals: list[float] | None) -> None:
    target = Served()
    target.never = {f"p{i}" for i in range(2, 30)}
    pressed = threading.Event()

    def listener(progress: Progress) -> None:
        if progress.ended == 2 and not pressed.is_set():
            pressed.set()
            _thread.interrupt_main()

    began = time.monotonic()
    result = replay(target, ROWS, ReplayPlan(arrivals_s=arrivals, concurrency=1), listener)
    assert time.monotonic() - began < 5
    assert result.interrupted
    assert result.lost == 0
    assert sum(r.state is State.DONE for r in result.records) == 2


def test_warm_up_goes_to_the_large_model_and_waits_for_the_cache() -> None:
    target = Served()
    result = warm_up(target, ROWS[:5], ReplayPlan(fields={"namespace": "n", "policy": "modm"}))
    assert all(r.admitted_s is not None for r in result.records)
    assert {(r.policy, r.warm_up, r.namespace) for r in target.requests} == {("large-only", True, "n")}


def test_thousands_of_rows() -> None:
    rows = [TraceRow(prompt="p", row=i) for i in range(2000)]
    result = replay(Served(), rows, ReplayPlan(arrivals_s=[0.0] * 2000))
    assert len(result.records) == 2000
