"""Every family behind a real Celery worker: loaded in its child, both routes, through ledger and image store.

One worker serves a pair, so each family draws and refines as the large or the small model of one. Sizes, steps and
weights are toys; classes, loading, residency and refining are those of the real models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from modm_tasks.cluster import DesiredRole
from modm_tasks.messages import Completion, Decision, Route, State
from ops.redis_server import RunningRedis
from tests.integration.test_worker_process import NODE, Rig, rigged
from tests.support.packages import altered_files
from workers.architectures import FAMILIES, build

#: (large, small); SANA-Sprint is both of its pair, so that a worker with one model is tried too.
PAIRS = [("sd3", "sana"), ("flux", "sdxl"), ("z-image", "qwen-image"), ("sana-sprint", "sana-sprint")]
STEPS = 4
KEYS = {
    "sd3": "max_sequence_length = 16",
    "flux": "max_sequence_length = 16",
    "sana": "max_sequence_length = 16",
    "z-image": "max_sequence_length = 64",
    "qwen-image": 'guidance_kwarg = "true_cfg_scale"',
    "sana-sprint": 'pipeline = "SanaSprintPipeline"\nmax_steps = 2',
}


def name_of(pair: tuple[str, str]) -> str:
    return "+".join(dict.fromkeys(pair))


@pytest.fixture(scope="module")
def rigs(redis_server: RunningRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rig]]:
    """A worker for each pair. They start together: most of it is one thread that imports torch and diffusers."""
    folder = tmp_path_factory.mktemp("families")
    text = ""
    for family in FAMILIES:
        build(family).save_pretrained(folder / family)
        text += (
            f'[tiny-{family}]\nfolder = "{family}"\nsize = "32x32"\naliases = ["t-{family}"]\n{KEYS.get(family, "")}\n'
        )
    (folder / "models.toml").write_text(text)
    with ExitStack() as stack:
        made = {}
        for pair in PAIRS:
            rig = stack.enter_context(rigged(redis_server, folder / f"home-{name_of(pair)}"))
            rig.worker(
                MODM_WORKER__ENGINE="diffusers",
                MODM_MODELS_FILE=str(folder / "models.toml"),
                MODM_LARGE_MODEL=f"t-{pair[0]}",
                MODM_SMALL_MODEL=f"t-{pair[1]}",
                MODM_NUM_INFERENCE_STEPS=str(STEPS),
            )
            made[name_of(pair)] = rig
        for rig in made.values():
            rig.ready()
        yield made


def drawn(rig: Rig, prompt: str, decision: Decision | None = None, **request: object) -> Completion:
    record = rig.ended(rig.submit(prompt, decision, **request))
    assert record.state is State.DONE, (record.error, rig.procs.logs())
    assert record.completion is not None
    return record.completion


def test_the_pairs_are_all_families() -> None:
    assert {family for pair in PAIRS for family in pair} == set(FAMILIES)


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_a_worker_serves_both_families_of_its_pair_through_both_routes(
    rigs: dict[str, Rig], pair: tuple[str, str]
) -> None:
    rig = rigs[name_of(pair)]
    large, small = (f"tiny-{family}" for family in pair)
    own = {name: 2 if name == "tiny-sana-sprint" else STEPS for name in (large, small)}
    status = rig.ready()
    assert (status.device, set(status.models), status.unwell) == ("cpu", {large, small}, None)
    assert (status.large_model, status.small_model) == (large, small), "aliases are told by their names"
    assert status.swap_s == {large: 0.0, small: 0.0}, "no budget on a CPU: both stay"

    miss = drawn(rig, "a red fox", seed=1)
    assert (miss.model, miss.steps_run, miss.skipped_steps, miss.depth) == (large, own[large], 0, 0)
    refined = drawn(rig, "a blue fox", rig.hit(3, uri=miss.uri), size="48x32", seed=2)
    assert (refined.model, refined.steps_run, refined.skipped_steps, refined.depth) == (small, 1, 3, 1)
    assert (refined.width, refined.height) == (48, 32)

    # The other way round: the small model from text alone, and a large worker of published roles that refines.
    by_small = drawn(rig, "a green fox", Decision(route=Route.SMALL_REFINE, policy="small-only"), seed=3)
    assert (by_small.model, by_small.steps_run) == (small, own[small])
    rig.ledger.set_control(mode="roles")
    rig.ledger.set_desired_role(NODE, DesiredRole(role="large", epoch=1))
    by_large = drawn(rig, "a grey fox", rig.hit(1, uri=by_small.uri), seed=4)
    assert by_large.model == large
    assert by_large.steps_run == own[large] - round(own[large] / STEPS)
    rig.ledger.set_control(mode="pooled")

    # Same request, seed and hardware: same bytes, on either route.
    again = [drawn(rig, "a red fox", seed=1), drawn(rig, "a blue fox", rig.hit(3, uri=miss.uri), size="48x32", seed=2)]
    for first, second in zip((miss, refined), again, strict=True):
        assert rig.store.read_bytes(second.uri) == rig.store.read_bytes(first.uri)


def test_nothing_in_diffusers_was_patched_for_it(rigs: dict[str, Rig]) -> None:
    """After every family was loaded and served by the workers' children."""
    assert rigs
    assert altered_files("diffusers") == []
