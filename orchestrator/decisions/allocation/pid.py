"""The paper's PID on the number of large workers (gains 0.6 / 0.05 / 0.05), kept as a comparison point.

It integrates twice (the output is added to the present value, which is itself never bounded), so it overshoots: after a
step from 16 to 4 it goes down to 1 at step 4 and needs about 10 periods to settle (facts D19, re-computed in the tests).
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.decisions.snapshot import PolicyState

KP, KI, KD = 0.6, 0.05, 0.05
#: One step is three minutes, a constant in the single-node reference (A7), whatever the period really is.
STEP_MIN = 3.0


def step(state: PolicyState, target: float, n_workers: int) -> PolicyState:
    """One period: ``current`` moves towards ``target``; the output is clipped to +-N. ``current`` must be set."""
    assert state.current is not None
    error = target - state.current
    integral = state.integral + error * STEP_MIN
    output = KP * error + KI * integral + KD * (error - state.last_error) / STEP_MIN
    output = max(-float(n_workers), min(float(n_workers), output))
    return replace(state, current=state.current + output, integral=integral, last_error=error)


def workers(current: float, n_workers: int) -> int:
    """The whole number that is put into force: rounded, in 1..N."""
    return max(1, min(n_workers, round(current)))
