"""The short form of `make chaos`: each fault once, on the real stack with the fake engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops.chaos.schedule import FAULTS, schedule
from ops.chaos.skew import sitecustomize
from ops.chaos.verify import Verdict
from tests.support.processes import ROOT


def test_schedule_is_bounded_and_repeatable() -> None:
    assert schedule(7, 3) == schedule(7, 3) != schedule(8, 3)
    assert sorted(schedule(7, 3)) == sorted([*FAULTS] * 3)


def test_verdict_counts_what_must_not_be() -> None:
    zero = dict.fromkeys(Verdict.model_fields, 0)
    assert Verdict(**zero | {"accepted": 9, "done": 8, "poison_failed": 1, "computed_twice": 3}).clean
    for name in ("lost", "failed", "doubled", "without_image", "without_vector", "idle_workers", "growing"):
        assert not Verdict(**zero | {name: 1}).clean


def test_a_process_and_its_children_can_be_given_a_wrong_clock() -> None:
    show = "import subprocess, sys, time; print(time.time(), flush=True); "
    child = "subprocess.run([sys.executable, '-c', 'import time; print(time.time_ns() / 1e9)'], check=True)"
    skew = {"MODM_TEST_CLOCK_OFFSET_S": "-86400", "PYTHONPATH": str(Path(sitecustomize.__file__).parent)}
    said = subprocess.run([sys.executable, "-c", show + child], env=os.environ | skew, capture_output=True, check=True)
    right = float(subprocess.check_output([sys.executable, "-c", "import time; print(time.time())"]))
    clocks = [float(line) for line in said.stdout.split()]
    assert clocks == pytest.approx([right - 86_400] * 2, abs=60)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_is_lost_and_nothing_doubled(tmp_path: Path) -> None:
    """Where this user may not mount or make network namespaces, those faults are left out, and the table says so."""
    command = [sys.executable, "-m", "ops.chaos", "--short", "--home", str(tmp_path / "chaos")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "| lost | 0 |" in done.stdout
    assert "| doubled | 0 |" in done.stdout
    left_out = {"fill-disk": "no small disk", "cut-hosts": "no second host"}
    for name, text in FAULTS.items():
        assert text in done.stdout or left_out.get(name, "?") in done.stdout, name
