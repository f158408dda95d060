"""Speed of the front: submit to queued, with 10,000 cached images, at a steady rate and in a burst.

A real orchestrator process over HTTP with a real Redis; the shipped hash embedder stands for CLIP, so the figures exclude
embedding. The workers' engine sleeps, a second for a large image, so the queue grows all the time, which is the front's
worst case. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from modm_tasks.errors import UnavailableError
from modm_tasks.image_store import ImageStore, path_for, to_png
from modm_tasks.ledger import Ledger
from modm_tasks.messages import State, new_request_id
from modm_tasks.settings import Settings, load_settings
from ops.redis_server import free_port, start_redis
from ops.stack import MODM
from orchestrator.report.machine import describe
from vector_store.backends import open_backend
from vector_store.cache import ImageCache
from vector_store.embedder import load_embedder
from vector_store.entries import ImageEntry

#: Threads and connections are made in the first second: it is reported by itself.
FIRST_S = 1.0


def fill_cache(settings: Settings, count: int) -> None:
    """Entries with random words; every file holds the same small image, so that workers can refine it."""
    embedder, backend = load_embedder("fake"), open_backend(settings)
    cache = ImageCache(backend, embedder.identity, embedder.dim, settings, ImageStore(settings.image_root))
    rng, png = np.random.default_rng(0), to_png(Image.new("RGB", (64, 64), "grey"))
    for start in range(0, count, 500):
        ids = [new_request_id() for _ in range(start, min(start + 500, count))]
        prompts = [" ".join(f"w{w}" for w in rng.integers(0, 3000, 8)) for _ in ids]
        vectors = embedder.embed_texts(prompts)
        entries = [
            ImageEntry(id=i, prompt=p, model="m", seed=0, size="64x64", depth=0, created_s=0.0, uri=path_for(i, 1))
            for i, p in zip(ids, prompts, strict=True)
        ]
        for entry in entries:
            cache.images.write_atomic(entry.uri, png)
        cache.add_many(list(zip(entries, vectors, strict=True)))
    cache.close()


def percentiles(values_ms: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values_ms, [50, 95, 99])
    return {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2), "p99_ms": round(float(p99), 2)}


def load(url: str, *, rate_per_s: float, seconds: float, threads: int = 16) -> tuple[list[str], list[float], float]:
    """Submit at a steady rate: (ids, client-side milliseconds of each call, rate reached per second).

    Over the standard library's client: a richer one would take a third of a core of the machine that is measured.
    """
    host, total = url.removeprefix("http://"), int(rate_per_s * seconds)
    rng = np.random.default_rng(1)
    bodies = [json.dumps({"prompt": " ".join(f"w{w}" for w in rng.integers(0, 3000, 8))}) for _ in range(total)]
    ids: list[str] = []
    calls_ms: list[float] = []
    lock = threading.Lock()
    began = time.monotonic()

    def work(thread: int) -> None:
        client = http.client.HTTPConnection(host, timeout=30)
        client.connect()
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(thread, total, threads):
            delay = began + index / rate_per_s - time.monotonic()
            if delay > 0:
                threading.Event().wait(delay)
            at = time.perf_counter()
            client.request("POST", "/v1/requests", bodies[index], {"content-type": "application/json"})
            answer = client.getresponse()
            text = answer.read()
            took = (time.perf_counter() - at) * 1000
            if answer.status != 202:
                raise UnavailableError(f"submit answered {answer.status}: {text[:200]!r}")
            with lock:
                ids.append(json.loads(text)["id"])
                calls_ms.append(took)
        client.close()

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, t) for t in range(threads)]:
            future.result()
    return ids, calls_ms, total / (time.monotonic() - began)


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_routed(ledger: Ledger, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while ledger.counts()["accepted"]:
        if time.monotonic() > until:
            raise UnavailableError("requests are still unrouted after a minute")
        threading.Event().wait(0.05)


@contextmanager
def workers(count: int, environ: Mapping[str, str], ledger: Ledger) -> Iterator[None]:
    """So many workers with the sleeping engine, from ready to ended."""
    running = [
        subprocess.Popen(
            [*MODM, "worker", "--gpu", str(number), "--name", f"sleeper{number}@%h"],
            env=dict(environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        until = time.monotonic() + 60
        while len(ledger.workers()) < count:
            if time.monotonic() > until or any(one.poll() is not None for one in running):
                raise UnavailableError("the workers did not start")
            threading.Event().wait(0.1)
        yield
    finally:
        for one in running:
            one.terminate()
        for one in running:
            one.wait(30)


def measure(*, cached: int, rate_per_s: float, seconds: float, policy: str, sleepers: int = 0) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        redis = start_redis(home / "redis")
        url = f"http://127.0.0.1:{(port := free_port())}"
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MODM_")} | {
            "MODM_HOME": str(home), "MODM_REDIS_URL": redis.url, "MODM_EMBEDDER": "fake", "MODM_API__PORT": str(port),
            "MODM_CACHE__CAPACITY": str(cached), "MODM_SLO__MAX_OPEN_REQUESTS": "1000000", "MODM_LOG_LEVEL": "WARNING",
            "MODM_ROUTING__POLICY": policy, "MODM_WORKER__ENGINE": "fake", "MODM_WORKER__MODE": "pooled",
            "MODM_WORKER__FAKE_LARGE_S": "1", "MODM_WORKER__FAKE_SMALL_S": "0.2",
        }  # fmt: skip
        settings = load_settings(home=home, redis_url=redis.url, cache={"capacity": cached})
        fill_cache(settings, cached)
        front = subprocess.Popen([sys.executable, "-m", "orchestrator.cli", "orchestrator"], env=environ)
        try:
            _wait_ready(url, front)
            ledger = Ledger.from_settings(settings)
            with workers(sleepers, environ, ledger):
                redis_pid = int(ledger.redis.info("server")["process_id"])
                before = {"front": cpu_s(front.pid), "redis": cpu_s(redis_pid)}
                ids, calls_ms, reached = load(url, rate_per_s=rate_per_s, seconds=seconds)
                wait_routed(ledger)
                used_ms = {
                    "front": 1000 * (cpu_s(front.pid) - before["front"]) / len(ids),
                    "redis": 1000 * (cpu_s(redis_pid) - before["redis"]) / len(ids),
                }
            records = [r for r in ledger.get_many(ids) if r.queued_s is not None]
        finally:
            front.terminate()
            front.wait(20)
            redis.stop()
    began_s = min(r.accepted_s for r in records)
    first_ms, steady_ms = (
        [1000 * ((r.queued_s or 0.0) - r.accepted_s) for r in records if (r.accepted_s - began_s < FIRST_S) is early]
        for early in (True, False)
    )
    return {
        "machine": describe(),
        "policy": policy,
        "cached_images": cached,
        "workers": sleepers,
        "asked_per_s": rate_per_s,
        "reached_per_s": round(reached, 1),
        "requests": len(ids),
        "hit_rate": round(
            sum(r.decision is not None and r.decision.source_id is not None for r in records) / len(ids), 3
        ),
        "finished": sum(r.state is State.DONE for r in records),
        "call": percentiles(calls_ms),
        "accepted_to_queued": percentiles(steady_ms),
        "accepted_to_queued_first_second": percentiles(first_ms),
        "cpu_ms_per_request": {name: round(value, 2) for name, value in used_ms.items()},
    }


def _wait_ready(url: str, front: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if front.poll() is not None:
            raise UnavailableError("the orchestrator did not start")
        try:
            if httpx.get(f"{url}/readyz", timeout=2, trust_env=False).is_success:
                return
        except httpx.TransportError:
            threading.Event().wait(0.1)
    raise UnavailableError("the orchestrator is not ready after a minute")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.front", description=__doc__)
    parser.add_argument("--cached", type=int, default=10_000)
    parser.add_argument("--rate-per-s", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--policy", choices=["modm", "modm-plus"], default="modm-plus")
    parser.add_argument("--workers", type=int, default=2, help="workers whose engine sleeps")
    given = parser.parse_args(argv)
    found = measure(
        cached=given.cached, rate_per_s=given.rate_per_s, seconds=given.seconds, policy=given.policy,
        sleepers=given.workers,
    )  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
