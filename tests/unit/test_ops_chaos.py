"""The chaos run's plan and its judgement: repeatable, and blind to no loss."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from modm_tasks.messages import Completion, Decision, RequestRecord, Route, State, SubmitRequest
from ops.chaos.mechanisms import Exercised, Limits, chain_depths, exercised, overtakers
from ops.chaos.rig import rig_environ
from ops.chaos.schedule import FAULTS, plan, share
from ops.chaos.traffic import REPEATED, TURN, body, paraphrase
from ops.chaos.verify import Seen, Verdict, judge
from ops.chaos.watch import LEAST_S, WARM_UP_S, Sample, growth, longest

LIMITS = Limits(wait_depth=2, max_depth=2)


def record(number: int, state: State = State.DONE, *, route: Route = Route.LARGE_GEN, **fields: Any) -> RequestRecord:
    done = Completion(
        uri=f"uri-{number}", width=64, height=64, seed=1, model="m", steps_run=50, skipped_steps=0, depth=0, gpu_s=0.1,
        vector="", embedder="e",
    )  # fmt: skip
    return RequestRecord(
        id=f"id-{number}",
        state=state,
        request=SubmitRequest(prompt=f"prompt {number}", deadline_s=fields.pop("deadline_s", None)),
        decision=Decision(
            route=route,
            policy="modm-plus",
            source_id=fields.pop("source_id", None),
            source_uri="x" if "source_depth" in fields else None,
            source_depth=fields.pop("source_depth", 0),
        ),
        completion=done if state is State.DONE else None,
        attempt=fields.pop("attempt", 1),
        **fields,
    )


def log(*moves: str) -> list[tuple[float, str, str]]:
    """``"state note"`` of each move, a second apart."""
    return [(float(at), *move.partition(" ")[::2]) for at, move in enumerate(moves)]


def seen(*records: RequestRecord, **changes: Any) -> Seen:
    """What a run without any fault would leave."""
    cached = [r for r in records if r.completion is not None and r.decision and r.decision.route is not Route.STORED]
    fields: dict[str, Any] = {
        "records": {r.id: r for r in records},
        "known": frozenset(r.id for r in records),
        "logs": {r.id: log("accepted", "queued", "running", r.state.value) for r in records},
        "vectors": {r.id: {"prompt": r.request.prompt, "uri": r.completion.uri} for r in cached if r.completion},
        "vector_rows": len(cached),
        "readable": frozenset(r.id for r in records if r.state is State.DONE),
    }
    return Seen(**fields | changes)


def verdict(what: Seen, *, ids: int = 3, **changes: Any) -> Verdict:
    prompts = {f"id-{i}": f"prompt {i}" for i in range(ids)}
    fields: dict[str, Any] = {"prompts": prompts, "poison": (), "damaged": {}, "max_attempts": 3, "limits": LIMITS}
    return judge(what, **fields | changes)


def test_the_plan_is_a_function_of_the_seed() -> None:
    first = plan(7, rounds=2, requests=240)
    assert first == plan(7, rounds=2, requests=240)
    assert first != plan(8, rounds=2, requests=240)
    assert sorted(name for _, name in first) == sorted([*FAULTS] * 2)
    assert [at for at, _ in first] == sorted(at for at, _ in first)
    assert first[0][0] > 0
    assert first[-1][0] <= 240
    less = plan(7, rounds=2, requests=240, without={"fill-disk", "cut-hosts"})
    assert {name for _, name in first} - {name for _, name in less} == {"fill-disk", "cut-hosts"}
    assert [share(10, 3, i) for i in range(3)] == [4, 3, 3]


def test_the_load_is_a_function_of_the_seed_and_has_an_occasion_for_everything() -> None:
    prompts = [f"scene {i}" for i in range(50)]

    def sent(seed: int) -> list[dict[str, Any]]:
        return [body(n, prompts, seed=seed, picky=0.9, steps=10) for n in range(10 * TURN)]

    first = sent(1)
    assert first == sent(1) != sent(2)
    assert all(SubmitRequest.model_validate(one) for one in first)
    seeded = [(one["prompt"], one["seed"]) for one in first if "seed" in one]
    assert sorted(Counter(seeded).values()) == [2] * REPEATED
    for turn in range(10):
        new, like, again = first[turn * TURN + 1 : turn * TURN + 4]
        assert new["prompt"] == paraphrase(like["prompt"]) != like["prompt"] == again["prompt"]
        assert "min_similarity" in new
        assert ("min_similarity" in like) is (turn % 2 == 0)
    assert min(one["deadline_s"] for one in first) < 100 < max(one["deadline_s"] for one in first)


def test_a_callers_settings_win_over_the_runs_but_not_its_home() -> None:
    environ = rig_environ({"MODM_WORKER__LEASE_S": "9", "MODM_HOME": "elsewhere", "PATH": "p"})
    assert environ["MODM_WORKER__LEASE_S"] == "9"
    assert environ["MODM_ROUTING__POLICY"] == "modm-plus"
    assert "MODM_HOME" not in environ


def test_a_run_without_faults_is_clean() -> None:
    found = verdict(seen(*(record(i) for i in range(3))))
    assert found.clean
    assert (found.accepted, found.done) == (3, 3)


def test_poison_that_failed_after_all_attempts_is_clean() -> None:
    rows = (record(0), record(1), record(2, State.FAILED, attempt=3))
    assert verdict(seen(*rows), poison={"id-2"}).clean
    assert verdict(seen(*rows)).missed == {"failed": 1}
    early = (record(0), record(1), record(2, State.FAILED, attempt=2))
    assert verdict(seen(*early), poison={"id-2"}).missed == {"poison_wrong": 1}
    assert verdict(seen(*(record(i) for i in range(3))), poison={"id-2"}).missed == {"poison_wrong": 1}


def test_poison_from_the_second_drawing_on_may_fail_or_be_answered_and_a_cancelled_source_is_no_loss() -> None:
    rows = (record(0), record(1, State.CANCELLED), record(2, State.FAILED, attempt=3))
    found = verdict(seen(*rows), poison_again={"id-0", "id-2"}, cancelled={"id-0", "id-1"})
    assert found.clean
    assert (found.cancelled, found.poison_failed) == (1, 1)


def test_what_took_part_is_read_from_the_transitions() -> None:
    waits = "waiting on id-0", "queued after waiting (source done, predicted 0.7): hit: similarity 0.7 skips 6 steps"
    logs = {
        "id-0": log("accepted", "queued miss: x", "running", "queued verify: score 0.1 below 0.2", "running", "done"),
        "id-1": log("accepted", *waits, "running", "done"),
        "id-2": log(
            "accepted", "waiting on id-1", "queued after waiting (source failed, predicted 0): miss: x", "done"
        ),
        "id-3": log("accepted", "queued miss: x", "queued late binding: hit: x", "done the refined image after all: x"),
    }
    rows = {r.id: r for r in (record(0), record(1, source_depth=2), record(2, route=Route.STORED), record(3))}
    found = exercised(rows, logs, LIMITS, waiting_at_death=4)
    assert found.model_dump(exclude_defaults=True) == {
        "waited": 2, "refined_what_they_waited_for": 1, "waited_in_a_chain_at_its_limit": 1, "waited_on_a_failed_source": 1,
        "waiting_when_the_orchestrator_died": 4, "rebound": 1, "answered_with_the_stored_image": 1, "escalated": 1,
        "drawn_again": 1, "answered_with_the_fallback": 1, "refined_from_the_depth_limit": 1,
    }  # fmt: skip
    assert set(found.never) == set(Exercised.model_fields) - set(found.model_dump(exclude_defaults=True))


def test_a_chain_is_as_long_as_it_is_when_the_last_one_joins() -> None:
    first = [(1.0, "waiting", "on id-0"), (3.0, "queued", "after waiting")]
    second = [(2.0, "waiting", "on id-1"), (9.0, "queued", "after waiting")]
    early, late = ([(at, "waiting", "on id-2"), (10.0, "queued", "after waiting")] for at in (2.5, 5.0))
    logs = {"id-1": first, "id-2": second, "early": early, "late": late}
    assert chain_depths(logs) == {"id-1": 1, "id-2": 2, "early": 3, "late": 2}


def test_one_in_a_hurry_overtakes_in_its_own_queue_only() -> None:
    patient, hurried = record(0, deadline_s=600.0, accepted_s=1.0), record(1, deadline_s=30.0, accepted_s=2.0)
    rows = {r.id: r for r in (patient, hurried)}

    def miss(taken_s: float) -> list[tuple[float, str, str]]:
        return [(3.0, "queued", "miss: x"), (taken_s, "running", "")]

    assert overtakers(rows, {"id-0": miss(9.0), "id-1": miss(5.0)}) == {"id-1"}
    assert overtakers(rows, {"id-0": miss(4.0), "id-1": miss(5.0)}) == set()
    other = [(3.0, "queued", "hit: x"), (5.0, "running", "")]
    assert overtakers(rows, {"id-0": miss(9.0), "id-1": other}) == set()


ROWS = tuple(record(i) for i in range(3))


@pytest.mark.parametrize(
    ("what", "missed"),
    [
        (seen(*ROWS[:2]), "lost"),
        (seen(*ROWS[:2], record(2, State.RUNNING)), "lost"),
        (seen(*ROWS, logs={r.id: log("running", "done", "done") for r in ROWS}), "doubled"),
        (seen(*ROWS, logs={r.id: log("running", "failed", "done") for r in ROWS}), "doubled"),
        (seen(*ROWS[:2], record(2, State.CANCELLED)), "cancelled_unasked"),
        (seen(*ROWS[:2], record(2, source_depth=3)), "too_deep"),
        (seen(*ROWS, known=frozenset({"id-0", "id-1", "id-2", "twin"})), "accepted_twice"),
        (seen(*ROWS, readable=frozenset({"id-0"})), "without_image"),
        (seen(*ROWS, vectors={}, vector_rows=0), "without_vector"),
        (seen(*ROWS, vectors={r.id: {"prompt": "x", "uri": "uri-0"} for r in ROWS}), "wrong_payload"),
        (seen(*ROWS, vector_rows=4), "extra_vectors"),
    ],
)
def test_everything_else_is_seen(what: Seen, missed: str) -> None:
    found = verdict(what)
    assert set(found.missed) == {missed}
    assert not found.clean


def test_work_done_twice_is_counted_but_allowed() -> None:
    logs = {r.id: log("queued", "running", "queued", "running", "done") for r in ROWS}
    assert verdict(seen(*ROWS, logs=logs)).computed_twice == 3
    assert verdict(seen(*ROWS, logs=logs)).clean
    again = {r.id: log("queued", "running", "queued verify: score 0.1 below 0.2", "running", "done") for r in ROWS}
    assert verdict(seen(*ROWS, logs=again)).computed_twice == 0


def test_a_stored_repeat_needs_no_vector_but_a_readable_image() -> None:
    """Unless the image was broken after the answer was given."""
    repeat = record(2, route=Route.STORED, source_id="id-0", done_s=100.0)
    unreadable = seen(*ROWS[:2], repeat, readable=frozenset({"id-1"}))
    assert verdict(seen(*ROWS[:2], repeat)).clean
    assert verdict(unreadable, damaged={"id-0": 50.0}).missed == {"without_image": 1}
    assert verdict(unreadable, damaged={"id-0": 150.0}).clean


def life(mib: list[float], descriptors: list[int]) -> list[Sample]:
    """Samples over a life that is just long enough."""
    step = (WARM_UP_S + LEAST_S + 5) / (len(mib) - 1)
    pairs = zip(mib, descriptors, strict=True)
    return [Sample(at_s=100 + i * step, rss_mib=m, descriptors=d) for i, (m, d) in enumerate(pairs)]


def test_growth_is_told_from_noise_and_from_the_warm_up() -> None:
    flat = growth("worker0", life([10.0] * 20 + [500.0, 510.0] * 20, [5] * 20 + [20] * 40))
    assert flat is not None
    assert flat.flat
    leaking = growth("worker0", life([500.0 + 5 * i for i in range(60)], [20] * 60))
    assert leaking is not None
    assert not leaking.flat
    losing = growth("worker0", life([500.0] * 60, list(range(60))))
    assert losing is not None
    assert not losing.flat
    assert growth("worker0", life([500.0] * 60, [20] * 60)[:30]) is None
    assert longest([flat, flat.model_copy(update={"watched_s": 500.0})])[0].watched_s == 500.0
