"""Workers and decisions as text. Pure."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 110


def worker_state(row: Mapping[str, Any]) -> str:
    """One word for how a worker stands."""
    if row["drained"]:
        return "drained" if row["settled"] else "draining"
    if not row["ready"]:
        return "away"
    if row.get("unwell"):
        return "unwell"
    if not row["settled"]:
        return "moving"
    return "busy" if row.get("busy_with") else "idle"


def worker_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per worker."""
    if not rows:
        return "no workers; start one with `modm worker --gpu 0`"
    width = max(6, *(len(row["worker"]) for row in rows))
    lines = [f"{'WORKER':{width}}  {'ROLE':6} {'PINNED':6} {'STATE':8} {'DEVICE':7} DRAWS"]
    for row in rows:
        pinned = "yes" if row["pinned"] else ""
        doing = row.get("unwell") or row.get("busy_with") or ""
        lines.append(
            f"{row['worker']:{width}}  {row['role'] or '?':6} {pinned:6} {worker_state(row):8} "
            f"{row.get('device') or '':7} {doing}".rstrip()
        )
    return "\n".join(lines)


def explained(answer: Mapping[str, Any]) -> str:
    """The ticks in words and numbers, newest last; what is zero or empty is left out (``--json`` has all)."""
    lines = [f"leader: {answer['leader'] or 'none'}"]
    lines.append(
        "since the start: " + (", ".join(f"{n} {w}" for w, n in sorted(answer["counts"].items())) or "nothing")
    )
    for tick in answer["ticks"]:
        at = time.strftime("%H:%M:%S", time.localtime(tick["at_s"]))
        lines += ["", f"{at}  {tick['allocation']}: {tick['n_large']} of {tick['n']} large ({tick['why']})"]
        lines.append(f"  reason: {tick['reason']}")
        seen = ", ".join(
            f"{name} {_short(value)}"
            for name, value in tick["inputs"].items()
            if value and name not in {"now_s", "speeds"}
        )
        lines += textwrap.wrap(f"saw: {seen}", WIDTH, initial_indent="  ", subsequent_indent="       ")
        for device, row in (tick["inputs"].get("speeds") or {}).items():
            many = f"{row['workers']} worker{'s' if row['workers'] != 1 else ''}"
            lines.append(f"  on {device}: {many}, large {_short(row['large_s'])} s, small {_short(row['small_s'])} s")
        for candidate in tick["candidates"]:
            mark = "*" if candidate.get("n_large") == tick["n_large"] else " "
            lines.append(f"  {mark} " + "  ".join(f"{k}={_short(v)}" for k, v in candidate.items()))
        lines += [f"  {worker}: {change}" for worker, change in tick["changes"].items()]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
