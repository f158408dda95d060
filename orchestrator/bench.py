"""The reference's experiments on the running stack: what each needs to have set, and gives back when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from modm_tasks.client import Client
from modm_tasks.ledger import Ledger
from modm_tasks.output import note
from modm_tasks.settings import Settings
from orchestrator import stack_profile
from orchestrator.controller.pooling import MARK
from orchestrator.controller.witness import Witness, first_tasks
from orchestrator.model_names import check_pair
from orchestrator.report.machine import describe
from orchestrator.report.progress import shown
from orchestrator.report.write import write_report, write_rows
from orchestrator.run_trace import Run, RunPlan, run_trace, save_images
from orchestrator.targets import HttpTarget
from orchestrator.traces.rows import TraceRow

SETTLE_S = 15.0
#: Decisions of the controller that are looked back at for `controller.csv`.
TICKS = 10_000
#: Put back when the experiment ends, whatever they were.
OURS = ("allocation", "mode", "cache_admission", "static_large", "period_s")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run. ``name`` decides the cache admission: only large images for throughput, all for the others (A6).

    ``control``: further fields of the runtime control, e.g. ``period_s``. ``flower``: its URL, where it is to be asked too.
    ``large_model``, ``small_model``: what the workers must serve, else the run is refused.
    """

    name: str
    kind: str
    rate_per_min: float
    rows: Sequence[TraceRow]
    folder: Path
    policy: str = "modm"
    features: str | None = None
    allocation: str = "slo"
    workers: str = "pooled-roles"
    concurrency: int = 2
    warm_up: int = 0
    seed: int = 42
    cache_directory: Path | None = None
    image_directory: Path | None = None
    flower: str = ""
    large_model: str | None = None
    small_model: str | None = None
    control: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The runtime control of this run."""
        return self.control | {
            "allocation": self.allocation,
            "mode": "roles" if self.workers == "roles" else "pooled",
            "cache_admission": "large-only" if self.name == "throughput" else "all",
        }


@contextmanager
def control_of(settings: Settings, client: Client, changes: dict[str, Any]) -> Iterator[None]:
    """The runtime control with ``changes``; what it was before comes back, also after an error or Ctrl-C.

    A mode that the controller chose by itself is left to it again: put back, it would be an operator's word.
    """
    before = client.get("/v1/control")
    if Ledger.from_settings(settings).document(MARK):
        before["mode"] = None
    client.put("/v1/control", json=changes)
    try:
        yield
    finally:
        client.put("/v1/control", json={name: before[name] for name in {*changes, *OURS}})


def settled(client: Client) -> None:
    """Wait until every worker is in the role that is wanted of it; SETTLE_S at most, and then run all the same."""
    until = time.monotonic() + SETTLE_S
    while not all(row["settled"] for row in client.get("/v1/workers")) and time.monotonic() < until:
        time.sleep(0.1)


def tick_row(tick: dict[str, Any]) -> dict[str, Any]:
    """One decision of the controller as a line of `controller.csv`."""
    seen = ("arrivals_per_min", "hit_rate", "backlog_large", "backlog_small", "large_s", "small_s")
    return {
        "at_s": round(tick["at_s"], 3),
        "why": tick["why"],
        "n_large": tick["n_large"],
        "target": tick["target"],
        "moved": len(tick["changes"]),
        **{name: tick["inputs"].get(name) for name in seen},
        "degradation": tick["degradation"],
        "reason": tick["reason"],
    }


def measure(settings: Settings, it: Experiment, *, witnessed: bool = False) -> Run:
    """Replay over HTTP into a cache namespace of its own, and write the report folder.

    ``witnessed``: note all along whether the roles that the system reports are what the workers really consume.
    Raises ModmError; KeyboardInterrupt after an interrupted run, whose report is written all the same.
    """
    namespace = f"bench-{it.name}-{uuid4().hex[:8]}"
    with ExitStack() as stack:
        client = stack.enter_context(Client.from_settings(settings))
        target = HttpTarget(client)
        check_pair(target.status(), settings, large=it.large_model, small=it.small_model)
        stack.enter_context(control_of(settings, client, it.settings))
        settled(client)
        if it.cache_directory is not None:
            target.import_images(it.cache_directory, namespace, note)
        plan = RunPlan(
            rows=it.rows, arrivals=it.kind, rate_per_min=it.rate_per_min, concurrency=it.concurrency, seed=it.seed,
            warm_up=it.warm_up, policy=it.policy, features=it.features, namespace=namespace, name=it.folder.name,
        )  # fmt: skip
        witness = Witness(settings, flower=it.flower) if witnessed else None
        watching: AbstractContextManager[object] = nullcontext() if witness is None else witness
        began_s = time.time()
        with watching:
            run = run_trace(target, plan, shown=shown, sheet=True)
        decisions = [
            tick_row(t) for t in client.get("/v1/controller/explain", last=TICKS)["ticks"] if t["at_s"] >= began_s
        ]
        run.report["settings"] |= {"allocation": it.allocation, "cache_admission": it.settings["cache_admission"]}
        ours = settings.controller
        run.report["settings"] |= {"window_s": ours.window_s, "bucket_s": ours.bucket_s}
        run.report["settings"]["period_s"] = it.control.get("period_s") or ours.period_s
        if it.image_directory is not None and not run.result.interrupted:
            save_images(target, run.result.records, it.image_directory)
    if witness is not None:
        run.report["roles"] = witness.verdict() | first_tasks(run.report["moves"], run.result.records)
    write_report(it.folder, run.report, run.result.records, sheet=run.sheet)
    write_rows(it.folder / "controller.csv", decisions)
    if witness is not None:
        write_rows(it.folder / "witness.csv", witness.rows)
    if run.result.interrupted:
        raise KeyboardInterrupt
    return run


def profile_stack(settings: Settings, it: Experiment, rows: Sequence[TraceRow]) -> dict[str, Any]:
    """A profile of the running stack, measured with ``rows``, under the control and the warm cache of the experiment."""
    namespace = f"profile-{uuid4().hex[:8]}"
    # Pooled, whatever the run has: a large worker of the published roles would draw hits with its own model.
    with Client.from_settings(settings) as client, control_of(settings, client, it.settings | {"mode": "pooled"}):
        target = HttpTarget(client)
        settled(client)
        if it.cache_directory is not None:
            target.import_images(it.cache_directory, namespace, note)
        fields = {"namespace": namespace, "policy": it.policy} | ({"features": it.features} if it.features else {})
        workers = sum(row["ready"] for row in client.get("/v1/workers"))
        found = stack_profile.measure(target, rows, fields=fields, workers=workers)
    machine = describe()
    return found | {
        "device": f"{machine['cores']}-core {machine['cpu']}, {', '.join(machine['gpu']) or 'no GPU'}",
        "how": f"Measured on the running stack with {workers} workers; seconds.",
    }


def save_vectors(settings: Settings, run: Run, warm: Path | None, path: Path) -> None:
    """What the run's prompts and images, and the images before it, resemble, and the ladder: all that the simulator needs
    to find sources by itself. Loads the embedder into this process."""
    import numpy as np
    from PIL import Image

    from modm_tasks.image_store import ImageStore
    from orchestrator.build import choose_ladder
    from vector_store.embedder import load_embedder

    embedder, store = load_embedder(settings.embedder, "cpu"), ImageStore(settings.image_root)
    done = [r for r in run.result.records if r.completion is not None]
    before = sorted(warm.glob("*.png")) if warm is not None else []
    text = embedder.embed_texts([r.request.prompt for r in done])
    np.savez_compressed(
        path,
        ids=np.array([r.id for r in done]),
        text=text.astype(np.float16),
        image=embedder.embed_images([store.read(r.completion.uri) for r in done if r.completion]).astype(np.float16),
        warm=(embedder.embed_images([Image.open(p) for p in before]) if before else text[:0]).astype(np.float16),
        ladder=np.array([(r.min_similarity, r.skipped_steps) for r in choose_ladder(settings).rungs]),
    )
