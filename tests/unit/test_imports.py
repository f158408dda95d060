"""The arrows of docs/architecture.md, and who may load the heavy libraries."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import MODM, ROOT

HEAVY = ("torch", "diffusers", "transformers", "open_clip", "torchvision")


def modules_of(*folders: str) -> list[str]:
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def loaded_by(modules: list[str]) -> list[str]:
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_arrows() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(program), "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_deciding_side_never_loads_torch() -> None:
    assert loaded_by(modules_of("modm_tasks", "orchestrator")) == []


def test_worker_parent_and_task_modules_never_load_torch() -> None:
    assert loaded_by(["modm_tasks.app", "workers.tasks", "workers.cli", "vector_store.cli", "ops.cli"]) == []


@pytest.mark.parametrize("args", [("--help",), ("--version",)])
def test_help_is_instant_and_light(args: tuple[str, ...]) -> None:
    code = (
        "import sys; sys.argv = ['modm', *sys.argv[1:]]\n"
        "from orchestrator.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        f"bad = [m for m in {(*HEAVY, 'celery', 'fastapi', 'qdrant_client', 'numpy')!r} if m in sys.modules]\n"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_help_time() -> None:
    """CPU seconds, best of five, because a busy machine stretches the wall clock and not the work."""
    assert min(_help_cpu_s() for _ in range(5)) < 0.5


def _help_cpu_s() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*MODM, "--help"], capture_output=True, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
