"""Start-up: `modm --help`, each process from spawn to ready, and the memory of each process of a running stack.

    python -m ops.benchmarks.startup [--runs 5] [--stack-runs 3] [--out FILE]

A real stack as `modm up` starts it: bundled models, one worker, Flower, nothing of the caller's MODM_ settings. Seconds
count from the moment that the process began, in the system's own books, to its first sign of readiness: Redis answers PING,
the orchestrator's ``/readyz`` and Flower's ``/healthcheck`` answer, the worker has loaded its models and said so, the
controller holds the lead. All but Redis start at once and share the cores, as they do for a user. Memory is read when
all are ready and one image was drawn: RSS counts shared pages in every process, PSS divides them among those that share
them (Linux only).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from modm_tasks.client import Client
from modm_tasks.errors import ModmError, UnavailableError
from modm_tasks.ledger import Ledger
from modm_tasks.settings import load_settings
from ops.benchmarks.document import hand_over
from ops.demo import MODM, demo_environ
from ops.processes import PROC, family
from ops.redis_server import ping
from ops.stack import StackState, read_state
from orchestrator.controller.history import leader
from orchestrator.report.machine import describe

ROLLUP = re.compile(r"^(Rss|Pss|Private_Clean|Private_Dirty):\s+(\d+) kB", re.MULTILINE)
KB_OF_MIB = 1024
POLL_S = 0.05
PROMPT = "a large red circle on the left of a plain blue background"


def help_s(runs: int, environ: Mapping[str, str]) -> list[float]:
    """Wall seconds of `modm --help`; one run before them warms the disk's cache."""
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        subprocess.run([*MODM, "--help"], env=dict(environ), stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def memory_mib(rollup: str) -> dict[str, int]:
    """RSS, PSS and private memory, MiB, of the text of ``/proc/PID/smaps_rollup``."""
    kb = {name: int(value) for name, value in ROLLUP.findall(rollup)}
    private = kb.get("Private_Clean", 0) + kb.get("Private_Dirty", 0)
    return {
        "rss_mib": round(kb["Rss"] / KB_OF_MIB),
        "pss_mib": round(kb["Pss"] / KB_OF_MIB),
        "private_mib": round(private / KB_OF_MIB),
    }


def memory(state: StackState) -> dict[str, dict[str, int]]:
    """Memory of each process by name; children as ``worker0 child``, numbered where there are more."""
    found = {}
    for noted in state.processes:
        found[noted.name] = memory_mib((PROC / str(noted.pid) / "smaps_rollup").read_text())
        # multiprocessing's resource tracker is a child too, of a few MiB, and does none of the work.
        rows = [memory_mib((PROC / str(p) / "smaps_rollup").read_text()) for p in family(noted.pid)]
        for number, row in enumerate(sorted(rows, key=lambda r: -r["rss_mib"]), 1):
            found[f"{noted.name} child{'' if number == 1 else f' {number}'}"] = row
    return found


def age_s(pid: int) -> float:
    """Seconds since a process began, to the hundredth: the clock ticks of ``/proc``."""
    began_ticks = int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    up_s = float((PROC / "uptime").read_text().split()[0])
    return up_s - began_ticks / os.sysconf("SC_CLK_TCK")


def is_ready(name: str, state: StackState, ledger: Ledger) -> bool:
    """Whether this process of the stack does its work."""
    if name == "redis":
        return ping(state.redis_url, timeout_s=1) is None
    if name == "controller":
        return leader(ledger, "controller") is not None
    if name.startswith("worker"):
        return bool(ledger.workers())
    url = f"{state.url}/readyz" if name == "orchestrator" else f"{state.flower_url}/healthcheck"
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.TransportError:
        return False


def watch(home: Path, up: subprocess.Popen[str]) -> dict[str, float]:
    """Seconds from its start until each process was ready, while `modm up` runs and until Flower answers."""
    ready: dict[str, float] = {}
    until = time.monotonic() + 300
    ledger = None
    while time.monotonic() < until:
        if up.poll():
            raise ModmError("`modm up` failed")
        state = read_state(home)
        if state is not None and state.redis_url:
            ledger = ledger or Ledger.from_settings(load_settings(home=home, redis_url=state.redis_url))
            for noted in state.processes:
                if noted.name not in ready and is_ready(noted.name, state, ledger):
                    ready[noted.name] = round(age_s(noted.pid), 2)
            if state.flower_url and len(ready) == len(state.processes) and up.poll() == 0:
                return ready
        time.sleep(POLL_S)
    raise UnavailableError(f"after five minutes only {', '.join(ready) or 'nothing'} is ready")


def one_stack(home: Path) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """(seconds to ready by process, memory by process) of one stack."""
    environ = demo_environ(os.environ, home, "diffusers")
    command = [*MODM, "up", "--workers", "1", "--mode", "pooled"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, text=True) as up:
        try:
            seconds = watch(home, up)
            state = read_state(home)
            assert state is not None
            with Client.from_settings(load_settings(home=home)) as client:
                client.post("/v1/images/generations", {"prompt": PROMPT, "size": "64x64"})
            return seconds, memory(state)
        finally:
            up.terminate()
            up.wait(30)
            subprocess.run([*MODM, "down", "--grace-s", "5"], env=environ, stdout=subprocess.DEVNULL, check=False)


def median_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median of each name over the runs that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(statistics.median([r[name] for r in rows if name in r]), 2) for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON document, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.startup", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of `modm --help`")
    parser.add_argument("--stack-runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    for name in [n for n in os.environ if n.startswith("MODM_")]:
        del os.environ[name]
    helps = help_s(given.runs, os.environ)
    times: list[dict[str, float]] = []
    memories: list[dict[str, dict[str, int]]] = []
    for number in range(given.stack_runs):
        print(f"stack {number + 1} of {given.stack_runs}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="modm-startup-") as home:
            seconds, held = one_stack(Path(home))
        times.append(seconds)
        memories.append(held)
    found: dict[str, Any] = {
        "machine": describe(),
        "load_average": round(os.getloadavg()[0], 1),
        "help_s": {"median": round(statistics.median(helps), 3), "runs": [round(s, 3) for s in helps]},
        "ready_s": median_of(times),
        "ready_s_runs": times,
        "memory": {name: median_of([m[name] for m in memories if name in m]) for name in memories[-1]},
    }
    hand_over(found, given.out)


if __name__ == "__main__":
    main()
