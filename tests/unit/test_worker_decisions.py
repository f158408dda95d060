from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modm_tasks.cluster import Control
from modm_tasks.errors import EngineError
from modm_tasks.messages import Decision, RequestRecord, Route, State, SubmitRequest, new_request_id
from modm_tasks.settings import Settings, SloSettings, WorkerSettings
from modm_tasks.verification import NO_FLOOR
from orchestrator.decisions.allocation import overload
from workers.engine import GenerateParams, RefineParams, start_step
from workers.pinning import gpu_of, pinned, served_models, thread_count
from workers.serve import model_for
from workers.testing import PROMPT_KEY, FakeEngine, picture
from workers.verify import verify_floor

SETTINGS = Settings(large_model="L", small_model="S", worker=WorkerSettings(fake_large_s=0, fake_small_s=0))
MISS = Decision(route=Route.LARGE_GEN, policy="t")
HIT = Decision(route=Route.SMALL_REFINE, policy="t", skipped_steps=30, source_id="x", source_uri="u")
SMALL_ALONE = Decision(route=Route.SMALL_REFINE, policy="small-only")


def record(decision: Decision) -> RequestRecord:
    request = SubmitRequest(prompt="p")
    return RequestRecord(id=new_request_id(), state=State.RUNNING, request=request, decision=decision)


@pytest.mark.parametrize(
    ("decision", "role", "mode", "model"),
    [
        (MISS, "large", "roles", "L"),
        (MISS, "small", "pooled", "L"),
        (HIT, "small", "roles", "S"),
        (HIT, "large", "roles", "L"),  # as published: a large worker refines spare hits with the large model
        (HIT, "large", "pooled", "S"),
        (HIT, None, "roles", "S"),
        (SMALL_ALONE, "large", "roles", "S"),
    ],
)
def test_which_model_draws(decision: Decision, role: str | None, mode: str, model: str) -> None:
    assert model_for(record(decision), SETTINGS, role=role, mode=mode) == model


@pytest.mark.parametrize(("rungs", "floor_steps"), [(0, 50), (1, 30), (2, 50), (2, 30)])
def test_the_fallback_model_refines_at_the_last_step_of_degradation_only(rungs: int, floor_steps: int) -> None:
    slo = SloSettings(floor_threshold_rungs=rungs, floor_steps=floor_steps, fallback_small_model="F")
    made = SETTINGS.model_copy(update={"slo": slo})
    levels = overload.levels(threshold_rungs=rungs, floor_steps=floor_steps, total_steps=50, faster_small=True)
    drawn = [model_for(record(HIT), made, role="small", mode="pooled", degradation=i) for i in range(len(levels))]
    assert drawn == ["F" if level.faster_small else "S" for level in levels]
    assert model_for(record(MISS), made, role="large", mode="pooled", degradation=len(levels) - 1) == "L"
    assert served_models(made) == ("L", "F", "S")
    assert served_models(SETTINGS) == ("L", "S")


def test_hits_are_verified_where_the_router_says_so_and_an_operators_floor_goes_first() -> None:
    operators, none = Control(verify_floor=0.2), Control()
    calibrated = HIT.model_copy(update={"verify_floor": 0.6})
    without_floor = HIT.model_copy(update={"verify_floor": NO_FLOOR})
    assert verify_floor(record(calibrated), none) == 0.6
    assert verify_floor(record(calibrated), operators) == 0.2
    assert verify_floor(record(without_floor), none) is None
    assert verify_floor(record(without_floor), operators) == 0.2
    assert verify_floor(record(HIT), operators) is None  # `modm`, or a request that leaves `verify` out
    assert verify_floor(record(MISS), operators) is None


@given(k=st.integers(0, 49))
def test_a_refiner_with_the_ladders_steps_starts_exactly_there(k: int) -> None:
    assert start_step(k, 50, 50) == k


@given(total=st.integers(1, 100), own=st.integers(1, 100), data=st.data())
def test_every_refiner_skips_the_same_share_and_runs_at_least_a_step(total: int, own: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, total))
    start = start_step(k, total, own)
    assert 0 <= start <= own - 1
    assert abs(start - k * own / total) <= 1


def test_impossible_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="out of range"):
        start_step(-1, 50, 50)


def test_pinning_keeps_what_the_user_set() -> None:
    assert gpu_of("gpu3@host") == "3"
    assert gpu_of("gpuMIG-1a@host") == "MIG-1a"
    assert gpu_of("celery@host") == ""
    out = pinned("3", {}, threads=2)
    assert out["CUDA_VISIBLE_DEVICES"] == out["HIP_VISIBLE_DEVICES"] == "3"
    assert "ROCR_VISIBLE_DEVICES" not in out, "both would hide every device"
    assert out["OMP_NUM_THREADS"] == "2"
    assert (
        pinned("3", {"ROCR_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "8"}, threads=2)
        .keys()
        .isdisjoint({"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"})
    )
    assert thread_count(SETTINGS, share=10_000) == 1
    assert served_models(Settings(large_model="a", small_model="a")) == ("a",)


def params(**changes: object) -> GenerateParams:
    return GenerateParams(**({"model": "L", "prompt": "a fox", "seed": 1} | changes))  # type: ignore[arg-type]


def test_the_fake_engine_is_deterministic_and_tells_what_it_drew() -> None:
    first, again, other = (np.asarray(picture(params(seed=s))) for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    engine = FakeEngine(SETTINGS)
    engine.load(["L", "S"])
    seen: list[tuple[int, int]] = []
    drawn = engine.generate(params(size=(32, 48), on_step=lambda done, total: seen.append((done, total))))
    assert drawn.image.size == (32, 48)
    assert drawn.image.info[PROMPT_KEY] == "a fox"
    assert seen[0] == (1, 50)
    assert seen[-1] == (50, 50)
    source = Image.new("RGB", (64, 64))
    refine = RefineParams(model="S", prompt="a cat", seed=1, source=source, skipped_steps=30, total_steps=50)
    assert engine.refine(refine).steps_run == 20
    assert "torch" not in sys.modules or engine.device == "fake"


def test_the_fake_engine_refuses_poison_and_unknown_models() -> None:
    engine = FakeEngine(SETTINGS)
    with pytest.raises(EngineError, match="not loaded"):
        engine.generate(params())
    engine.load(["L"])
    with pytest.raises(EngineError, match="fail"):
        engine.generate(params(prompt="[[fail]]"))
