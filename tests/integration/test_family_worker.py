"""Two real families behind a real Celery worker: loaded in its child, both routes, through ledger and image store."""

from __future__ import annotations

from pathlib import Path

from modm_tasks.messages import State
from ops.redis_server import RunningRedis
from tests.integration.test_worker_process import rigged
from workers.architectures import build


def test_a_worker_serves_sd3_and_sana_from_folders(redis_server: RunningRedis, tmp_path: Path) -> None:
    text = ""
    for family in ("sd3", "sana"):
        build(family).save_pretrained(tmp_path / family)
        text += (
            f'[tiny-{family}]\nfolder = "{family}"\nsize = "32x32"\nmax_sequence_length = 16\naliases = ["t{family}"]\n'
        )
    (tmp_path / "models.toml").write_text(text)
    with rigged(redis_server, tmp_path / "home") as rig:
        rig.worker(
            MODM_WORKER__ENGINE="diffusers",
            MODM_MODELS_FILE=str(tmp_path / "models.toml"),
            MODM_LARGE_MODEL="tsd3",
            MODM_SMALL_MODEL="tsana",
            MODM_NUM_INFERENCE_STEPS="4",
        )
        status = rig.ready()
        assert (status.device, set(status.models)) == ("cpu", {"tiny-sd3", "tiny-sana"})
        assert (status.large_model, status.small_model) == ("tiny-sd3", "tiny-sana"), "aliases are told by their names"
        assert status.swap_s == {"tiny-sd3": 0.0, "tiny-sana": 0.0}

        first = rig.ended(rig.submit("a red fox", seed=1))
        assert first.state is State.DONE, (first.error, rig.procs.logs())
        assert first.completion is not None
        assert (first.completion.model, first.completion.steps_run) == ("tiny-sd3", 4)

        second = rig.ended(rig.submit("a blue fox", rig.hit(3, uri=first.completion.uri), size="48x32", seed=2))
        assert second.completion is not None, (second.error, rig.procs.logs())
        assert (second.completion.model, second.completion.steps_run) == ("tiny-sana", 1)
        assert (second.completion.width, second.completion.height) == (48, 32)

        again = rig.ended(rig.submit("a red fox", seed=1))
        assert again.completion is not None
        assert rig.store.read_bytes(again.completion.uri) == rig.store.read_bytes(first.completion.uri)
