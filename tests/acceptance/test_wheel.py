"""The wheel, installed away from the checkout, runs the stack with the bundled models."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT

pytestmark = pytest.mark.slow


def run(
    *command: str | Path, cwd: Path, env: dict[str, str], timeout_s: float = 150
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline, with the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MODM_")}
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=ROOT, env=env)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A fresh environment outside the checkout: the wheel, and the third-party packages of this one by reference."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MODM_", "PYTHONPATH", "VIRTUAL_ENV"))}
    env |= {"MODM_HOME": str(tmp_path / "home"), "MODM_API__PORT": "0", "MODM_WORKER__DEVICE": "cpu", "NO_COLOR": "1"}
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path, env=env)
    python = tmp_path / "venv/bin/python"
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path, env=env)
    # A line of a .pth adds the folder but not its own .pth files, so the editable checkout does not come along.
    Path(where.stdout.strip(), "third-party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path, env=env)
    yield tmp_path / "venv/bin", env
    subprocess.run([tmp_path / "venv/bin/modm", "down"], env=env, cwd=tmp_path, check=False, capture_output=True)


def test_wheel_holds_the_data_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"modm_tasks", "orchestrator", "vector_store", "workers", "ops"}
    for needed in (
        "workers/models.toml",
        "workers/weights/scenes-large/model_index.json",
        "workers/weights/scenes-small/model_index.json",
        "vector_store/weights/scenes-clip/scenes-clip.safetensors",
        "ops/scenes/data/trace.jsonl",
        "ops/flower/flowerconfig.py",
        "modm_tasks/py.typed",
    ):
        assert needed in names
    assert any(name.startswith("ops/scenes/data/warm-cache/") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_version_outside_the_checkout(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    bin_, env = installed
    assert run(bin_ / "modm", "--version", cwd=tmp_path, env=env).stdout.startswith("modm ")
    where = run(
        bin_ / "python", "-c", "import orchestrator; print(orchestrator.__file__)", cwd=tmp_path, env=env
    ).stdout
    assert where.startswith(str(tmp_path))


@pytest.mark.timeout(300)
def test_stack_draws_with_the_bundled_models(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    bin_, env = installed
    run(bin_ / "modm", "up", "--workers", "1", "--no-flower", cwd=tmp_path, env=env)
    image = tmp_path / "image.png"
    run(bin_ / "modm", "submit", "a large red circle", "--output", image, cwd=tmp_path, env=env)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert run(bin_ / "modm", "down", cwd=tmp_path, env=env).stdout == "stopped\n"
