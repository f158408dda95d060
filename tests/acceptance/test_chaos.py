"""The short form of `make chaos`: each fault once, on the real stack with the fake engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops.chaos.schedule import FAULTS, schedule
from ops.chaos.verify import Verdict
from tests.support.processes import ROOT


def test_schedule_is_bounded_and_repeatable() -> None:
    assert schedule(7, 3) == schedule(7, 3) != schedule(8, 3)
    assert sorted(schedule(7, 3)) == sorted([*FAULTS] * 3)


def test_verdict_counts_what_must_not_be() -> None:
    zero = dict.fromkeys(Verdict.model_fields, 0)
    assert Verdict(**zero | {"accepted": 9, "done": 8, "poison_failed": 1, "computed_twice": 3}).clean
    for name in ("lost", "failed", "doubled", "without_image", "without_vector", "idle_workers"):
        assert not Verdict(**zero | {name: 1}).clean


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif("MODM_TEST_CHAOS" not in os.environ, reason="a minute of faults; MODM_TEST_CHAOS=1 runs it")
def test_nothing_is_lost_and_nothing_doubled(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ops.chaos", "--short", "--home", str(tmp_path / "chaos")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "| lost | 0 |" in done.stdout
    assert "| doubled | 0 |" in done.stdout
    assert all(text in done.stdout for text in FAULTS.values())
