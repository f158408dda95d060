"""The ledger against a real Redis: every move, every refusal, leases, waiting, quotas, order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest

from modm_tasks.errors import (
    ConflictError,
    LeaseLostError,
    NotFoundError,
    RefusedError,
)
from modm_tasks.ledger import Ledger
from modm_tasks.ledger_states import MOVES, OPEN, allowed
from modm_tasks.messages import FINAL, Decision, Route, State, SubmitRequest, new_request_id
from tests.support.ledger import MISS, accept, completion, hit, queued
from tests.support.processes import wait_until


def test_a_request_goes_from_accepted_to_done(ledger: Ledger) -> None:
    request_id = accept(ledger)
    assert ledger.get(request_id).state is State.ACCEPTED
    assert ledger.route(request_id, MISS, text_vector="BBBB")
    record = ledger.claim("large-gen", "gpu0@h", lease_s=5)
    assert record is not None
    assert (record.id, record.attempt, record.worker) == (request_id, 1, "gpu0@h")
    ledger.finish(request_id, 1, completion())
    done = ledger.get(request_id)
    assert done.state is State.DONE
    assert done.completion is not None
    assert done.completion.vector == ""
    assert ledger.field(request_id, "ivec") == "AAAA"
    stamps = [done.arrival_s, done.queued_s, done.claimed_s, done.done_s]
    assert all(s is not None for s in stamps)
    assert stamps == sorted(stamps)  # type: ignore[type-var]
    assert [state for _, state, _ in ledger.log(request_id)] == ["accepted", "queued", "running", "done"]
    assert ledger.index("unadmitted") == [request_id]
    assert ledger.admitted(request_id, 0.5)
    assert not ledger.admitted(request_id, 0.5)
    assert ledger.get(request_id).clip_score == 0.5
    assert ledger.field(request_id, "tvec") is None
    assert ledger.counts()["open"] == 0


def test_the_window_adds_up_the_deadlines_of_what_comes(ledger: Ledger) -> None:
    for slo_s in (10.0, 4.0, 0.0):  # 0: none is known yet
        ledger.accept(new_request_id(), SubmitRequest(prompt="a"), slo_s=slo_s)
    window = ledger.window(window_s=60, bucket_s=10, now_s=ledger.now_s())
    assert (window["arrivals"], window["deadlines"], window["deadline_sum"]) == (3, 2, 14)


def test_an_idempotency_key_gives_the_first_request(ledger: Ledger) -> None:
    first, new = ledger.accept(new_request_id(), SubmitRequest(prompt="a", idempotency_key="k", client="c"))
    again, new_again = ledger.accept(new_request_id(), SubmitRequest(prompt="a", idempotency_key="k", client="c"))
    other, _ = ledger.accept(new_request_id(), SubmitRequest(prompt="a", idempotency_key="k", client="d"))
    assert (first, new, new_again) == (again, True, False)
    assert other != first
    assert ledger.counts()["open"] == 2


def test_bounds_on_open_requests(ledger: Ledger) -> None:
    accept(ledger, client="c", max_client_open=1)
    with pytest.raises(RefusedError, match="this client's") as caught:
        accept(ledger, client="c", max_client_open=1)
    assert caught.value.retry_after_s > 0
    accept(ledger, client="d", max_client_open=1, max_open=2)
    with pytest.raises(RefusedError, match="2 requests are unfinished"):
        accept(ledger, max_open=2)


def test_a_clients_place_is_free_again_after_the_end(ledger: Ledger) -> None:
    request_id = accept(ledger, client="c", max_client_open=1)
    assert ledger.cancel(request_id) is State.CANCELLED
    assert accept(ledger, client="c", max_client_open=1)


def test_order_is_by_rank(ledger: Ledger) -> None:
    slow = queued(ledger, "slow", rank_offset_s=100)
    first = queued(ledger, "first")
    second = queued(ledger, "second")
    assert [i for i, _ in ledger.ready("large-gen")] == [first, second, slow]
    assert ledger.position(second, "large-gen") == 1
    claimed = [ledger.claim("large-gen", "w", lease_s=5) for _ in range(4)]
    assert [c.id if c else None for c in claimed] == [first, second, slow, None]


def test_a_claim_is_renewed_and_lost_when_it_expires(ledger: Ledger) -> None:
    request_id = queued(ledger)
    ledger.claim("large-gen", "w1", lease_s=0.05)
    assert wait_until(ledger.expire, 5, "the lease to expire") == [(request_id, State.QUEUED, "large-gen")]
    with pytest.raises(LeaseLostError):
        ledger.renew(request_id, 1, 5)
    with pytest.raises(LeaseLostError):
        ledger.finish(request_id, 1, completion())
    again = ledger.claim("large-gen", "w2", lease_s=5)
    assert again is not None
    assert again.attempt == 2
    assert ledger.renew(request_id, 2, 5, step=7) == "ok"
    assert ledger.get(request_id).step == 7
    assert ledger.expire() == []
    ledger.finish(request_id, 2, completion())
    with pytest.raises(LeaseLostError):
        ledger.finish(request_id, 2, completion())


def test_poison_fails_after_three_deaths_and_can_be_retried(ledger: Ledger) -> None:
    request_id = queued(ledger)
    for attempt in range(1, 4):
        assert ledger.claim("large-gen", "w", lease_s=0.01) is not None
        ((_, state, _),) = wait_until(ledger.expire, 5, "the lease to expire")
        assert state is (State.FAILED if attempt == 3 else State.QUEUED)
    record = ledger.get(request_id)
    assert "died 3 times" in (record.error or "")
    assert ledger.index("failed") == [request_id]
    ledger.retry(request_id)
    assert ledger.get(request_id).state is State.ACCEPTED
    assert ledger.index("accepted") == [request_id]
    assert ledger.index("failed") == []
    with pytest.raises(ConflictError):
        ledger.retry(request_id)


def test_what_killed_two_workers_goes_behind_all_others_also_where_ranks_are_deadlines(ledger: Ledger) -> None:
    """Found by `make chaos`: behind `now` was before everybody, so it killed a third one at once."""
    killer, other = queued(ledger), queued(ledger)
    far = ledger.now_s() + 600
    ledger.set_rank(killer, far)
    ledger.set_rank(other, far + 1)
    for nth, order in ((1, [killer, other]), (2, [other, killer])):
        claimed = ledger.claim("large-gen", "w", lease_s=0.01)
        assert claimed is not None
        assert (claimed.id, claimed.attempt) == (killer, nth)
        wait_until(ledger.expire, 5, "the lease to expire")
        assert [i for i, _ in ledger.ready("large-gen")] == order


def test_a_retried_request_forgets_its_source(ledger: Ledger) -> None:
    request_id, other = queued(ledger, decision=hit("src")), queued(ledger, decision=hit("src"))
    ledger.claim("small-refine", "w", lease_s=5)
    assert ledger.fail(request_id, 1, "two\nlines\r\nof error", retry=False) is State.FAILED
    ledger.retry(request_id)
    assert ledger.route(request_id, MISS)
    assert ledger.in_use(["src"]) == {"src"}  # the other request still refines from it
    ledger.claim("large-gen", "w", lease_s=5)
    assert ledger.renew(request_id, 2, 5) == "ok"
    assert ledger.log(request_id)[3][1:] == ("failed", "two lines  of error")
    ledger.cancel(other)
    assert ledger.in_use(["src"]) == set()


def test_a_worker_reports_errors_and_gives_work_back(ledger: Ledger) -> None:
    request_id = queued(ledger)
    rank = ledger.get(request_id).rank
    for attempt in range(1, 5):  # giving back never spends an attempt
        assert ledger.claim("large-gen", "w", lease_s=5) is not None
        ledger.give_back(request_id, attempt)
    assert ledger.get(request_id).rank == rank
    states = []
    for attempt in range(5, 8):
        ledger.claim("large-gen", "w", lease_s=5)
        states.append(ledger.fail(request_id, attempt, "boom", retry=True))
    assert states == [State.QUEUED, State.QUEUED, State.FAILED]
    assert ledger.get(request_id).error == "boom"
    other = queued(ledger)
    ledger.claim("large-gen", "w", lease_s=5)
    assert ledger.fail(other, 1, "no", retry=False) is State.FAILED


def test_a_hit_without_its_source_becomes_a_miss(ledger: Ledger) -> None:
    request_id = queued(ledger, decision=hit("src"))
    assert ledger.in_use(["src", "other"]) == {"src"}
    ledger.claim("small-refine", "w", lease_s=5)
    ledger.reroute_to_large(request_id, 1, "source gone", fallback=completion(clip_score=0.1))
    record = ledger.get(request_id)
    assert record.state is State.QUEUED
    assert record.decision is not None
    assert record.decision.route is Route.LARGE_GEN
    assert ledger.in_use(["src"]) == set()
    assert ledger.field(request_id, "fallback") is not None
    again = ledger.claim("large-gen", "w", lease_s=5)
    assert again is not None
    assert again.id == request_id


def test_cancel_in_every_state(ledger: Ledger) -> None:
    assert ledger.cancel(accept(ledger)) is State.CANCELLED
    waiting_source = queued(ledger, "source")
    waiter = accept(ledger, "waiter")
    assert ledger.wait_on(waiter, waiting_source, MISS) == "ok"
    assert ledger.cancel(waiter) is State.CANCELLED
    assert ledger.waiters(waiting_source) == []
    assert ledger.cancel(waiting_source) is State.CANCELLED
    assert ledger.claim("large-gen", "w", lease_s=5) is None
    running = queued(ledger, "running")
    ledger.claim("large-gen", "w", lease_s=5)
    assert ledger.cancel(running) is State.RUNNING
    assert ledger.renew(running, 1, 5) == "cancelled"
    ledger.finish_cancelled(running, 1)
    assert ledger.get(running).state is State.CANCELLED
    with pytest.raises(ConflictError, match="has ended"):
        ledger.cancel(running)
    with pytest.raises(NotFoundError):
        ledger.cancel(new_request_id())


@pytest.mark.parametrize("move", ["fail", "fail for good", "give back", "reroute"])
def test_a_request_cancelled_while_it_runs_is_never_queued_again(ledger: Ledger, move: str) -> None:
    """The worker may not have heard of it yet: its next move, whatever it is, ends the request."""
    request_id = queued(ledger, decision=hit("src"), client="c")
    ledger.claim("small-refine", "w", lease_s=5)
    assert ledger.cancel(request_id) is State.RUNNING
    moves: dict[str, Callable[[], State]] = {
        "fail": lambda: ledger.fail(request_id, 1, "boom", retry=True),
        "fail for good": lambda: ledger.fail(request_id, 1, "boom", retry=False),
        "give back": lambda: ledger.give_back(request_id, 1),
        "reroute": lambda: ledger.reroute_to_large(request_id, 1, "low score", fallback=completion()),
    }
    assert moves[move]() is State.CANCELLED
    record = ledger.get(request_id)
    assert record.state is State.CANCELLED
    assert record.error is None
    assert [ledger.index(name) for name in ("open", "running", "failed")] == [[], [], []]
    assert ledger.in_use(["src"]) == set()
    assert ledger.claim("small-refine", "w", lease_s=5) is None
    assert ledger.claim("large-gen", "w", lease_s=5) is None


def test_waiting_ends_with_the_source(ledger: Ledger) -> None:
    source = queued(ledger, "source")
    waiter = accept(ledger, "waiter")
    assert ledger.wait_on(waiter, source, hit("x"), until_s=5.0) == "ok"
    assert ledger.waiters(source) == [waiter]
    assert ledger.get(waiter).state is State.WAITING
    ledger.claim("large-gen", "w", lease_s=5)
    ledger.finish(source, 1, completion())
    late = accept(ledger, "late")
    assert ledger.wait_on(late, source, MISS) == "ok"  # done but not yet in the cache: still worth waiting
    assert ledger.route(waiter, hit(source), expected=State.WAITING)
    ledger.admitted(source, None)
    assert ledger.wait_on(accept(ledger, "too late"), source, MISS) == "ended"
    assert ledger.route(late, MISS, expected=State.WAITING)
    assert ledger.counts()["waiting"] == 0


def test_a_queued_miss_changes_its_queue(ledger: Ledger) -> None:
    request_id = queued(ledger)
    assert ledger.route(request_id, hit(), expected=State.QUEUED)
    assert ledger.ready("large-gen") == []
    assert [i for i, _ in ledger.ready("small-refine")] == [request_id]
    ledger.claim("small-refine", "w", lease_s=5)
    assert not ledger.route(request_id, MISS, expected=State.QUEUED)


def test_an_exact_repeat_is_answered_at_once(ledger: Ledger) -> None:
    request_id = accept(ledger)
    decision = Decision(route=Route.STORED, policy="modm-plus", source_id="s")
    assert ledger.finish_stored(request_id, completion(steps_run=0), decision)
    record = ledger.get(request_id)
    assert record.state is State.DONE
    assert record.admitted_s is not None
    assert not ledger.finish_stored(request_id, completion(), decision)


def test_many_workers_never_claim_the_same(ledger: Ledger) -> None:
    wanted = {queued(ledger, f"p{i}") for i in range(60)}
    taken: list[str] = []
    lock = threading.Lock()

    def work(name: str) -> None:
        while (record := ledger.claim("large-gen", name, lease_s=30)) is not None:
            with lock:
                taken.append(record.id)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(taken) == sorted(wanted)


@pytest.mark.parametrize("seed", range(6))
def test_random_walks_keep_every_index_true(ledger: Ledger, seed: int) -> None:
    """Whatever happens in whatever order: one state each, indexes agree with states, only allowed moves are logged."""
    rng = random.Random(seed)
    ids = [accept(ledger, f"p{i}", client=f"c{i % 3}") for i in range(8)]
    actions: list[Callable[[str], object]] = [
        lambda i: ledger.route(i, rng.choice([MISS, hit(rng.choice(ids))])),
        lambda i: ledger.route(i, hit(rng.choice(ids)), expected=State.QUEUED),
        lambda i: ledger.route(i, MISS, expected=State.WAITING),
        lambda i: ledger.wait_on(i, rng.choice(ids), MISS),
        lambda _: ledger.claim(rng.choice(["large-gen", "small-refine"]), "w", lease_s=rng.choice([0.0, 60.0])),
        lambda i: ledger.finish(i, ledger.get(i).attempt, completion()),
        lambda i: ledger.fail(i, ledger.get(i).attempt, "x", retry=rng.random() < 0.7),
        lambda i: ledger.give_back(i, ledger.get(i).attempt),
        lambda i: ledger.reroute_to_large(i, ledger.get(i).attempt, "x"),
        lambda i: ledger.cancel(i),
        lambda i: ledger.retry(i),
        lambda i: ledger.admitted(i, 0.1),
        lambda _: ledger.expire(),
    ]
    for _ in range(250):
        try:
            rng.choice(actions)(rng.choice(ids))
        except (ConflictError, LeaseLostError):
            continue
    records = {i: ledger.get(i) for i in ids}
    by_state = {s: {i for i, r in records.items() if r.state is s} for s in State}
    assert set(ledger.index("open")) == {i for i, r in records.items() if r.state in OPEN}
    assert set(ledger.index("accepted")) == by_state[State.ACCEPTED]
    assert set(ledger.index("running")) == by_state[State.RUNNING]
    assert set(ledger.index("waiting")) == by_state[State.WAITING]
    assert set(ledger.index("failed")) == by_state[State.FAILED]
    ready = {i for q in ("large-gen", "small-refine") for i, _ in ledger.ready(q)}
    assert ready == by_state[State.QUEUED]
    for i in ids:
        states = [State(s) for _, s, _ in ledger.log(i)]
        assert all(allowed(a, b) for a, b in pairwise(states)), states
    quotas = {c: int(n) for c, n in ledger.redis.hgetall(f"{ledger.prefix}client_open").items()}
    expected: dict[str, int] = {}
    for r in records.values():
        if r.state in OPEN:
            expected[r.request.client] = expected.get(r.request.client, 0) + 1
    assert quotas == expected
    uses: dict[str, int] = {}
    for i, r in records.items():
        source_id = ledger.field(i, "source_id")
        assert r.state in OPEN or source_id is None
        if source_id is not None:
            uses[source_id] = uses.get(source_id, 0) + 1
    assert {s: int(n) for s, n in ledger.redis.hgetall(f"{ledger.prefix}sources").items()} == uses


def test_the_table_of_moves_is_closed() -> None:
    assert set(MOVES) == set(State)
    assert all(not MOVES[s] for s in FINAL - {State.FAILED})
    assert all(allowed(s, State.CANCELLED) for s in OPEN)
