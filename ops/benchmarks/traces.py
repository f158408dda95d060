"""Memory and speed of reading a trace as large as DiffusionDB's: a slice far in, a conversion, an inspection.

    python -m ops.benchmarks.traces [--rows 14000000] [--inspect-rows 2000000] [--order shuffled|time] [--out FILE]

Writes files with the columns and types of ``metadata-large.parquet`` into a temporary folder (some 2 GB at 14 M rows,
removed at the end): prompts as long as the published ones, 1 prompt to 8 rows as there, minute stamps, users. By default
the rows lie in any order but time's, the worst case: a slice by time then touches every row group. Then the user's own
commands run on them, each a process of its own whose peak memory the system tells when it ends (``wait4``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ops.benchmarks.document import hand_over
from ops.demo import MODM
from orchestrator.report.machine import describe

#: Of 14 M published rows 1.8 M prompts are distinct; lengths are those of ../shared/data (p10 46, median 176, p90 292).
ROWS_PER_PROMPT, MEAN_WORDS, WORDS = 8, 28, 20_000
#: What pandas and pyarrow write unless told otherwise.
GROUP_ROWS = 1_048_576
MINUTES = 19 * 24 * 60  # of August 2022, about


def prompts(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct texts of random words, some rare: they compress about as text does."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = rng.integers(2, 9, WORDS)
    drawn = letters[rng.integers(0, len(letters), (WORDS, 8))].tolist()
    words = np.array(["".join(row[:n]) for row, n in zip(drawn, lengths, strict=True)], dtype=object)
    out: list[str] = []
    while len(out) < count:
        sizes = np.maximum(2, rng.normal(MEAN_WORDS, 14, min(10_000, count - len(out))).astype(int))
        picked = words[np.minimum(rng.zipf(1.3, sizes.sum()), WORDS) - 1].tolist()
        ends = np.cumsum(sizes).tolist()
        out += [" ".join(picked[low:high]) for low, high in zip([0, *ends], ends, strict=False)]
    return out


def write(path: Path, rows: int, order: str, seed: int = 0) -> None:
    """A file of the published schema, row group by row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    texts = pa.array(prompts(max(1, rows // ROWS_PER_PROMPT), rng))
    users = pa.array([f"{rng.integers(2**62):064x}" for _ in range(max(1, rows // 1000))])
    start_us = 1_659_312_000_000_000
    writer = None
    for low in range(0, rows, GROUP_ROWS):
        n = min(GROUP_ROWS, rows - low)
        at = np.arange(low, low + n)
        minutes = rng.integers(0, MINUTES, n) if order == "shuffled" else at * MINUTES // rows
        table = pa.table(
            {
                "image_name": pa.array([f"{i:032x}.png" for i in at.tolist()]),
                "prompt": texts.take(pa.array(at % len(texts))),
                "part_id": pa.array((at // 1000 % 65_536).astype(np.uint16)),
                "seed": pa.array(rng.integers(0, 2**32, n, dtype=np.uint32)),
                "step": pa.array(np.full(n, 50, dtype=np.uint16)),
                "cfg": pa.array(np.full(n, 7.0, dtype=np.float32)),
                "sampler": pa.array(np.full(n, 8, dtype=np.uint8)),
                "width": pa.array(np.full(n, 512, dtype=np.uint16)),
                "height": pa.array(np.full(n, 512, dtype=np.uint16)),
                "user_name": users.take(pa.array(rng.integers(0, len(users), n))),
                "timestamp": pa.array(start_us + minutes * 60_000_000, pa.timestamp("us", tz="UTC")),
                "image_nsfw": pa.array(rng.random(n, dtype=np.float32)),
                "prompt_nsfw": pa.array(rng.random(n, dtype=np.float32)),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def run(*args: str) -> dict[str, Any]:
    """One `modm` command: its seconds and peak memory, and what it printed as JSON."""
    began = time.perf_counter()
    with subprocess.Popen([*MODM, *args, "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`modm {args[0]} {args[1]}` ended with status {process.returncode}")
    return {"seconds": time.perf_counter() - began, "peak_mib": used.ru_maxrss / 1024, "printed": json.loads(text)}


def row(command: str, file_rows: int, taken: int, ran: dict[str, Any]) -> dict[str, Any]:
    """``rows_per_s`` counts the rows of the file, which all are looked at; ``taken`` came out."""
    return {
        "command": command,
        "file_rows": file_rows,
        "rows_taken": taken,
        "seconds": round(ran["seconds"], 1),
        "rows_per_s": round(file_rows / ran["seconds"]),
        "peak_mib": round(ran["peak_mib"]),
    }


def measure(rows: int, inspect_rows: int, order: str, folder: Path) -> list[dict[str, Any]]:
    large, small, out = folder / "metadata-large.parquet", folder / "metadata.parquet", str(folder / "out.jsonl")
    found = []
    if rows:
        _say(f"writing {rows:,} rows")
        _write_aside(large, rows, order)
        _say(f"{large.stat().st_size / 2**20:,.0f} MiB; reading a slice")
        start, count = rows * 139 // 140, 1000
        ran = run("trace", "convert", str(large), out, "--start", str(start), "--num-requests", str(count))
        found.append(row(f"trace convert --start {start} --num-requests {count}", rows, ran["printed"]["rows"], ran))
        large.unlink()
    if inspect_rows:
        _say(f"writing {inspect_rows:,} rows")
        _write_aside(small, inspect_rows, order)
        ran = run("trace", "inspect", str(small))
        found.append(row("trace inspect", inspect_rows, ran["printed"]["requests"], ran))
        ran = run("trace", "convert", str(small), out)
        found.append(row("trace convert", inspect_rows, ran["printed"]["rows"], ran))
    return found


def _write_aside(path: Path, rows: int, order: str) -> None:
    """In a process of its own: a command's peak counts from the memory of the process that starts it."""
    this = [sys.executable, "-m", "ops.benchmarks.traces"]
    subprocess.run([*this, "--write", str(path), "--rows", str(rows), "--order", order], check=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON document, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.traces", description=__doc__)
    parser.add_argument("--rows", type=int, default=14_000_000, help="of the file that a slice is taken from; 0 = none")
    parser.add_argument("--inspect-rows", type=int, default=2_000_000, help="of the file that is read whole; 0 = none")
    parser.add_argument("--order", choices=["shuffled", "time"], default="shuffled")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.write is not None:
        write(given.write, given.rows, given.order)
        return
    with tempfile.TemporaryDirectory(prefix="modm-traces-") as folder:
        rows = measure(given.rows, given.inspect_rows, given.order, Path(folder))
    found = {"machine": describe(), "order": given.order, "load_average": round(os.getloadavg()[0], 1), "rows": rows}
    hand_over(found, given.out)


if __name__ == "__main__":
    main()
