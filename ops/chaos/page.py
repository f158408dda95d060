"""What a chaos run shows: the table on the terminal and in docs/chaos.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from ops.chaos.hosts import NAME
from ops.chaos.mechanisms import Limits
from ops.chaos.run import Outcome
from ops.chaos.schedule import FAULTS
from ops.chaos.verify import COUNTS
from ops.chaos.watch import LEAST_S, MAX_DESCRIPTORS, MAX_MIB, MAX_SHARE, WARM_UP_S, Growth, longest
from ops.stack import gpu_count


def machine() -> str:
    """Cores and processor family, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()}-core {name}, {gpu_count() or 'no'} GPU"


def page(outcome: Outcome, command: str, *, lease_s: float, limits: Limits) -> str:
    """The result as a page for the docs."""
    verdict = outcome.verdict
    faults = [
        f"| {text} | {len(times)} | {sorted(times)[len(times) // 2]:.1f} | {max(times):.1f} |"
        for name, text in FAULTS.items()
        if (times := outcome.recovery_s.get(name))
    ]
    counts = [
        f"| {name.replace('_', ' ')} | {value}{'' if name in COUNTS or not value else ' (should be 0)'} |"
        for name, value in verdict.model_dump().items()
    ]
    mechanisms = [
        f"| {name.replace('_', ' ')} | {value or 'never (should not be 0)'} |"
        for name, value in outcome.exercised.model_dump().items()
    ]
    if outcome.errors:
        repeats = f"{outcome.outages} times, of these {len(outcome.errors)} after an answer that says not to"
    else:
        repeats = f"{outcome.outages} times"
    return "\n".join(
        [
            "# What was broken, and what came of it",
            "",
            f"`make chaos CHAOS_ARGS='{command}'`, {machine()}, {outcome.took_s:.0f} s. A supervisor starts dead processes "
            "again, as systemd or Compose would. Beside the faults below, the message of every tenth request was sent "
            f"twice ({outcome.duplicates} in all). {outcome.restarts} restarts of processes; clients repeated a call "
            f"{repeats}.",
            "",
            "| fault | injected | seconds to recover, median | longest |",
            "|---|---|---|---|",
            *faults,
            "",
            "Recovered: the orchestrator takes work, every process runs, every worker is ready (the start of its GPU child "
            "is included: imports and models), and a request has ended since. Counted from the moment that the fault is "
            "over: the process dead, the disk emptied, the hosts joined. *Prompts that kill*: until each has failed, three "
            "deaths later; *whose refined image scores too low*: until that is the answer, three deaths later.",
            "",
            *(f"Not injected, as this machine does not allow it: {line}." for line in outcome.left_out),
            *([""] if outcome.left_out else []),
            "| afterwards | |",
            "|---|---|",
            *counts,
            "",
            "*computed twice* is allowed; *stored* are repeats answered with a stored image; *damaged* are the images that "
            "the run broke itself. All rows below *computed twice* have to be 0, or the exit status is 4.",
            "",
            "What the mechanisms of `modm-plus` did meanwhile. One that never took part would not be tested, so a 0 fails "
            "the run too.",
            "",
            "| requests that | |",
            "|---|---|",
            *mechanisms,
            "",
            f"For that, chains of waiting and generations of refining are bounded by {limits.wait_depth} and "
            f"{limits.max_depth} here, the floor of verification is set so that many refined images are below it (all of "
            "them while prompts are out that kill when drawn again), and its budget is a fifth of the hits. *Too "
            "deep* are requests beyond one of the two bounds.",
            "",
            *_memory(outcome.grown),
            f"The plan is a function of the seed and is paced by finished requests. Leases last {lease_s:g} s here instead "
            "of 15, so that a dead worker's request is seen to come back within the run; attempts are 3, as everywhere.",
            "",
            f"Clocks are wrong by a minute to a day in one process after another (`time.time` of it and its children). The "
            f"second host is a network and a host name of its own ({NAME}), whose cable is pulled for three leases; the "
            "image disk is a small file system, filled to the last byte and held full until the front has refused work. "
            "Poison is drawn by the real engine, then kills its process from the safety hook.",
            "",
        ]
    )


def _memory(grown: Sequence[Growth]) -> list[str]:
    rows = longest(grown)
    if not rows:
        return []
    return [
        "| longest-lived process of each kind | watched, s | memory, MiB | file descriptors |",
        "|---|---|---|---|",
        *(
            f"| {g.name} | {g.watched_s:.0f} | {g.first_mib:.0f} to {g.last_mib:.0f} "
            f"| {g.first_descriptors} to {g.last_descriptors} |"
            for g in rows
        ),
        "",
        f"Medians of the first and the last quarter of a process's life after its first {WARM_UP_S:g} s, where that is at "
        f"least {LEAST_S:g} s. *Growing* counts all processes, these and shorter-lived ones, that added more than "
        f"{MAX_MIB:g} MiB and {MAX_SHARE:.0%}, or more than {MAX_DESCRIPTORS} descriptors.",
        "",
    ]
