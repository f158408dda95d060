"""ops/setup.sh with an installer that only notes what it is asked for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import ROOT

Setup = Callable[..., "subprocess.CompletedProcess[str]"]
INDEX = "https://wheels.example/torch"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy with a .venv whose python and uv are stubs."""
    root = tmp_path / "project"
    (root / "ops").mkdir(parents=True)
    for name in ("ops/setup.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root / name)
    tools = root / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text("#!/bin/sh\ncase $1 in -c) echo 3.11.9;; esac\n")
    note = 'printf "%s\\n" "$*" >>"$(dirname "$0")/../asked"\n'
    made = 'case "$*" in *"-e ."*) : >"$(dirname "$0")/modm"; chmod +x "$(dirname "$0")/modm";; esac\n'
    (tools / "uv").write_text(f"#!/bin/sh\n{note}{made}")
    for tool in ("python", "uv"):
        (tools / tool).chmod(0o755)
    return root


@pytest.fixture
def setup(project: Path) -> Setup:
    def run(**environ: str) -> subprocess.CompletedProcess[str]:
        (project / ".venv/asked").unlink(missing_ok=True)
        base = {"PATH": "/usr/bin:/bin", "TORCH": "", "TORCH_INDEX": ""}  # as make exports what is not set
        return subprocess.run(
            ["bash", "ops/setup.sh"], cwd=project, env=base | environ, capture_output=True, text=True, check=False
        )

    return run


def asked(project: Path) -> list[str]:
    path = project / ".venv/asked"
    return path.read_text().splitlines() if path.exists() else []


def packages(lock: Path) -> set[str]:
    return {line.split("==")[0] for line in lock.read_text().splitlines() if re.match(r"[a-z0-9].*==", line)}


def test_cuda_is_the_lock_as_it_is(project: Path, setup: Setup) -> None:
    assert setup().returncode == 0
    sync, editable = asked(project)
    assert sync == "pip sync --compile-bytecode --require-hashes requirements.lock"
    assert editable.endswith("-e .")
    assert setup().returncode == 0
    assert asked(project) == [], "nothing changed, nothing is done"


@pytest.mark.parametrize("kind", ["cpu", "rocm"])
def test_another_torch_comes_from_the_users_index_and_stays_chosen(project: Path, setup: Setup, kind: str) -> None:
    assert setup(TORCH=kind, TORCH_INDEX=INDEX).returncode == 0
    sync, torch, _ = asked(project)
    lock = project / sync.split()[-1]
    everything = packages(ROOT / "requirements.lock")
    left_out = everything - packages(lock)
    assert {"torch", "torchvision", "triton"} <= left_out
    assert all(re.match(r"torch|triton|cuda-|nvidia-", name) for name in left_out)
    assert "--require-hashes" in sync
    assert lock.read_text().count("--hash=") > 1000
    versions = dict(re.findall(r"^(torch|torchvision)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert torch == (f"pip install --index {INDEX} torch=={versions['torch']} torchvision=={versions['torchvision']}")
    assert setup().returncode == 0
    assert asked(project) == [], "a later `make test` does not bring the CUDA build back"
    assert setup(TORCH="cuda").returncode == 0
    assert asked(project)[0].endswith("requirements.lock"), "until it is asked for"


@pytest.mark.parametrize(
    ("environ", "says"),
    [({"TORCH": "tpu"}, "TORCH=tpu is unknown; use cuda, cpu or rocm"), ({"TORCH": "rocm"}, "needs TORCH_INDEX")],
)
def test_what_cannot_be_is_one_line_and_exit_2(project: Path, setup: Setup, environ: dict[str, str], says: str) -> None:
    done = setup(**environ)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert says in line
    assert asked(project) == []
