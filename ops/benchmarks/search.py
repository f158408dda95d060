"""Search in the cache at 10,000 to 1,000,000 vectors: the embedded store, the client's local mode, the reference's steps.

    python -m ops.benchmarks.search [--sizes 10000,100000] [--dim 768] [--embeddings FILE.npy] [--out FILE.json]

Every system runs in a process of its own, so that memory is its own; all get the same vectors and queries. Synthetic
vectors are clusters with noise: good for times, flattering for recall, so recall is also measured on ``--embeddings``,
real ones, whose last tenth are the queries. The reference normalises the whole matrix, multiplies, and sorts all scores
to take one (facts D24); "exact" is one matrix product and an argmax, the least that any exact search must do. "apart" is
the embedded store in a process of its own, as an orchestrator has it; "edge" has it in the process that asks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from modm_tasks.settings import CacheSettings, Settings
from orchestrator.serve import SWITCH_S
from vector_store.backends import Point, VectorBackend, open_backend
from vector_store.backends.client import ClientBackend
from vector_store.embedder import Vector, unit_rows

SYSTEMS = ("edge-none", "edge-int8", "edge-binary", "apart-binary", "client-local", "reference", "exact")
#: The client's local mode takes seconds a query beyond this, and minutes to fill.
LOCAL_MODE_UP_TO = 100_000
QUERIES, INSERTS = 300, 200
#: A quiet hour, and what the front is built for.
SEARCHES_PER_S = (20, 200)
_NAME = "images_bench_default"


def synthetic(n: int, dim: int, queries: int, seed: int = 0) -> tuple[Vector, Vector]:
    """(base [n, dim], queries [queries, dim]): 1 cluster to 50 vectors; a query is a vector of the base, disturbed."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n // 50), dim), dtype=np.float32)
    base = np.empty((n, dim), dtype=np.float32)
    for start in range(0, n, 50_000):
        part = slice(start, min(n, start + 50_000))
        noise = rng.standard_normal((part.stop - part.start, dim), dtype=np.float32)
        base[part] = unit_rows(centres[rng.integers(0, len(centres), len(noise))] + 0.8 * noise)
    noise = rng.standard_normal((queries, dim), dtype=np.float32)
    return base, unit_rows(base[rng.integers(0, n, queries)] + 0.5 * noise / np.sqrt(dim))


def real(path: Path) -> tuple[Vector, Vector]:
    """The first nine tenths of a .npy file as base, the rest as queries."""
    rows = unit_rows(np.load(path, allow_pickle=False))
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


def nearest(base: Vector, queries: Vector) -> list[int]:
    """Exact answers, by blocks of rows so that a million of them cost one pass."""
    best, answers = np.full(len(queries), -np.inf, dtype=np.float32), np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(base), 20_000):
        scores = base[start : start + 20_000] @ queries.T
        rows = scores.argmax(axis=0)
        found = scores[rows, np.arange(len(queries))]
        better = found > best
        best[better], answers[better] = found[better], rows[better] + start
    return [int(i) for i in answers]


def recall_at_1(base: Vector, queries: Vector, answers: list[int], truth: list[int]) -> float:
    """Share of answers as near as the nearest. By score, not by index: 13 % of real prompts are exact repeats."""
    near = [base[a] @ q >= base[t] @ q - 1e-4 for a, t, q in zip(answers, truth, queries, strict=True)]
    return float(np.mean(near))


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 3) for q in (50, 99)}


def timed(call: Callable[[Vector], int], queries: Vector) -> tuple[list[float], list[int]]:
    """(seconds of each query, answers); the first five warm up and are asked again."""
    for query in queries[:5]:
        call(query)
    seconds, answers = [], []
    for query in queries:
        began = time.perf_counter()
        answers.append(call(query))
        seconds.append(time.perf_counter() - began)
    return seconds, answers


def measure(system: str, base: Vector, queries: Vector, folder: Path) -> dict[str, Any]:
    """One system's figures. ``rss_mib`` is what it added to a process that held the vectors already."""
    before = _rss_mib()
    truth = nearest(base, queries)
    if system in ("reference", "exact"):
        call, row = _plain(system, base), {}
    else:
        backend = _open(system, folder)
        row = _fill(backend, base)
        call = _searcher(backend)
    seconds, answers = timed(call, queries)
    row |= {"search_ms": percentiles_ms(seconds)}
    row["recall_at_1"] = round(recall_at_1(base, queries, answers, truth), 4)
    row["rss_mib"] = round(_rss_mib() - before)
    if system in ("reference", "exact"):
        row["insert_ms"] = percentiles_ms(_copies(base))
    else:
        n = len(base)
        for number, rate in enumerate((*SEARCHES_PER_S, None)):
            name = "beside_searches_without_pause" if rate is None else f"beside_{rate}_searches_per_s"
            row[name] = _insert_while_searching(backend, base, queries, first=n + number * INSERTS, searches_per_s=rate)
        backend.close()
    return row


def _open(system: str, folder: Path) -> VectorBackend:
    kind, _, codes = system.partition("-")
    url = "memory:" if kind == "client" else "edge:"
    cache = CacheSettings(quantisation="none" if kind == "client" else codes)
    return open_backend(Settings(home=folder, qdrant_url=url, cache=cache), apart=kind == "apart")


def _point(i: int, vector: Vector) -> Point:
    payload = {"seq": i, "depth": i % 3, "client": "", "size": "64x64", "prompt": "a prompt of some length " * 3}
    return Point(id=str(uuid.UUID(int=i + 1)), vector=vector, payload=payload)


def _fill(backend: VectorBackend, base: Vector) -> dict[str, Any]:
    backend.create(_NAME, base.shape[1])
    began = time.perf_counter()
    for start in range(0, len(base), 512):
        backend.upsert(_NAME, [_point(i, base[i]) for i in range(start, min(len(base), start + 512))])
    filled = time.perf_counter()
    backend.tidy(_NAME)
    return {"fill_s": round(filled - began, 2), "tidy_s": round(time.perf_counter() - filled, 2)}


def _searcher(backend: VectorBackend) -> Callable[[Vector], int]:
    return lambda query: uuid.UUID(backend.search(_NAME, query)[0].id).int - 1


def _plain(system: str, base: Vector) -> Callable[[Vector], int]:
    def reference(query: Vector) -> int:
        normalised = base / np.linalg.norm(base, axis=1, keepdims=True)
        return int(np.argsort(normalised @ query)[::-1][0])

    return reference if system == "reference" else lambda query: int(np.argmax(base @ query))


def _copies(base: Vector) -> list[float]:
    """The reference's insert: the matrix is copied to add a row."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        np.concatenate([base, base[:1]])
        seconds.append(time.perf_counter() - began)
    return seconds


def _insert_while_searching(
    backend: VectorBackend, base: Vector, queries: Vector, *, first: int, searches_per_s: int | None
) -> dict[str, dict[str, float]]:
    """A second thread searches while this one inserts one image at a time, some 50 a second. ``searches_per_s`` None: it
    searches without pause.
    """
    sys.setswitchinterval(SWITCH_S)  # as in the orchestrator
    end, searches = threading.Event(), []
    # The client's local mode holds its lock for a search of a second, and an insert waits for it.
    inserts_wanted = 20 if isinstance(backend, ClientBackend) and len(base) > 20_000 else INSERTS
    call = _searcher(backend)

    def search() -> None:
        started, n = time.perf_counter(), 0
        while not end.is_set():
            began = time.perf_counter()
            call(queries[n % 20])
            searches.append(time.perf_counter() - began)
            n += 1
            if searches_per_s is not None:
                end.wait(max(0.0, started + n / searches_per_s - time.perf_counter()))

    thread = threading.Thread(target=search)
    thread.start()
    inserts, pause = [], threading.Event()
    for i in range(inserts_wanted):
        point = _point(first + i, base[i % len(base)])
        began = time.perf_counter()
        backend.upsert(_NAME, [point])
        inserts.append(time.perf_counter() - began)
        pause.wait(0.02)
    end.set()
    thread.join()
    return {"insert_ms": percentiles_ms(inserts), "search_ms": percentiles_ms(searches)}


def _rss_mib() -> float:
    """Of this process and of those it has started."""
    try:
        ids = ["self", *(i for file in Path("/proc/self/task").glob("*/children") for i in file.read_text().split())]
        pages = sum(int(Path(f"/proc/{i}/statm").read_text().split()[1]) for i in ids)
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _run_one(args: argparse.Namespace) -> None:
    if args.embeddings:
        base, queries = real(Path(args.embeddings))
    else:
        base, queries = synthetic(args.n, args.dim, args.queries)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args.one, base, queries, Path(folder))
    print(json.dumps({"system": args.one, "n": len(base), "dim": base.shape[1], "real": bool(args.embeddings)} | row))


def _child(system: str, args: argparse.Namespace, n: int, embeddings: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "ops.benchmarks.search", "--one", system, "--n", str(n), "--dim", str(args.dim)]
    slow = system in ("reference", "client-local") and n > 20_000
    command += ["--queries", str(min(30, args.queries) if slow else args.queries)]
    command += ["--embeddings", embeddings] if embeddings else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The table of docs/performance.md."""
    print(
        "| system | vectors | search p50/p99 ms | recall@1 | insert beside 200 searches/s | insert, no pause | added MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        plain = row.get("insert_ms")
        paced, loaded = (
            plain or row[f"beside_{name}"]["insert_ms"] for name in ("200_searches_per_s", "searches_without_pause")
        )
        what = f"{row['n']:,} x {row['dim']}{' real' if row['real'] else ''}"
        search = row["search_ms"]
        print(
            f"| {row['system']} | {what} | {search['p50']:.2f} / {search['p99']:.2f} | {row['recall_at_1']:.3f} | "
            f"{paced['p50']:.2f} / {paced['p99']:.2f} | {loaded['p50']:.2f} / {loaded['p99']:.2f} | {row['rss_mib']} |"
        )


def main(argv: list[str] | None = None) -> None:
    """Run all systems at all sizes and print the table."""
    parser = argparse.ArgumentParser(description="Search benchmark of the image cache.")
    parser.add_argument("--sizes", default="10000,100000", help="Vectors, with commas.")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"Of {', '.join(SYSTEMS)}.")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--embeddings", help="Real unit vectors, .npy [n, dim], for recall.")
    parser.add_argument("--out", type=Path, help="Write the rows as JSON.")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, default=10_000, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        _run_one(args)
        return
    systems = args.systems.split(",")
    rows = [_child(s, args, 0, args.embeddings) for s in systems] if args.embeddings else []
    for n in map(int, args.sizes.split(",")):
        for system in systems:
            if system != "client-local" or n <= LOCAL_MODE_UP_TO:
                rows.append(_child(system, args, n, None))
                print(f"{system} at {n}: {rows[-1]['search_ms']}", file=sys.stderr)
    show(rows)
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    print(f"\n{machine['cores']} cores, load average {os.getloadavg()[0]:.1f} at the end", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
