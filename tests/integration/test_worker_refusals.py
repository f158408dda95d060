"""Workers that cannot start: one clear line and an exit code each, and the worker beside them goes on serving."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modm_tasks.messages import State
from ops.redis_server import RunningRedis
from tests.integration.test_worker_process import NODE, Rig, rigged
from tests.support.processes import MODM, Process
from workers.architectures import build


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated repository, for a revision that is not there, and for any other name."""

    def _refuse(self) -> None:
        gated, moved = "gated" in self.path, "moved" in self.path
        code = "GatedRepo" if gated else "RevisionNotFound" if moved else "RepoNotFound"
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _refuse

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


#: Large model -> (exit code, what the line says). 2: the entry is wrong; 1: it cannot be loaded here.
REFUSALS = {
    "misspelt": (2, "no model 'misspelt' in the catalogue"),
    "absent": (2, "model 'absent': there is no folder"),
    "half": (2, "lacks its transformer folder"),
    "no-weights": (1, "model 'no-weights': cannot load"),
    "too-big": (1, "model 'too-big' needs 1.4 MiB and the device has 1.0: use a smaller model"),
    "gated": (1, "org/gated is gated: accept its licence on the hub, then set HF_TOKEN"),
    "moved": (1, "org/moved has no revision 'v9'"),
    "private": (1, "there is no repository 'org/private'"),
}
CATALOGUE = """
[absent]
folder = "absent"
[half]
folder = "half"
[no-weights]
folder = "no-weights"
[too-big]
folder = "too-big"
max_sequence_length = 16
[gated]
repo = "org/gated"
[moved]
repo = "org/moved"
revision = "v9"
[private]
repo = "org/private"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("half", "no-weights"):
        build("sana").save_pretrained(folder / name)
    build("z-image").save_pretrained(folder / "too-big")
    for file in (folder / "half" / "transformer").iterdir():
        file.unlink()
    (folder / "half" / "transformer").rmdir()
    (folder / "no-weights" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "models.toml").write_text(CATALOGUE)
    return folder / "models.toml"


def refused(rig: Rig, name: str, gpu: int, **environ: str) -> Process:
    command = [*MODM, "worker", "--gpu", str(gpu), "--large-model", name, "--small-model", name]
    return rig.procs.start(command, name=name, env=environ)


@pytest.mark.slow
def test_a_worker_that_cannot_serve_says_why_and_takes_no_other_down(
    redis_server: RunningRedis, tmp_path: Path, models: Path, hub: str
) -> None:
    with rigged(redis_server, tmp_path, fake_large_s=0.01) as rig:
        rig.worker()
        rig.ready()
        environ = {
            "MODM_WORKER__ENGINE": "diffusers",
            "MODM_WORKER__MEMORY_MIB": "1",
            "MODM_MODELS_FILE": str(models),
            "HF_ENDPOINT": hub,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
        }
        started = {name: refused(rig, name, gpu, **environ) for gpu, name in enumerate(REFUSALS, start=1)}
        for name, (code, says) in REFUSALS.items():
            worker = started[name]
            assert worker.popen.wait(120) == code, (name, worker.tail())
            lines = [line for line in worker.output().splitlines() if line.startswith("error:")]
            assert len(lines) == 1, (name, worker.output())
            assert says in lines[0]
            assert "Traceback" not in worker.output()
        assert [status.worker for status in rig.ledger.workers()] == [NODE], "the well one, and no other"
        assert rig.ended(rig.submit("a red fox")).state is State.DONE
