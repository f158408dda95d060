"""Prometheus metrics of the orchestrator. Names are listed in docs/http-api.md; Grafana and the alert rules use them.

What the ledger knows is read at scrape time, so it is true for the cluster whichever orchestrator is asked. Histograms
are observed in this process as requests pass through it: sum them over orchestrators.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from modm_tasks.errors import ModmError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Decision, RequestRecord
from modm_tasks.settings import Settings
from vector_store.cache import ImageCache

log = logging.getLogger(__name__)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 90, 120, 240, 480, 960)
SIMILARITIES = (0.1, 0.2, 0.25, 0.27, 0.28, 0.29, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
STEPS = (0, 5, 10, 15, 20, 25, 30, 40, 50)
HOUR = (10, 60, 300, 900, 3600, 14_400, 86_400, 604_800)


class Observer:
    """Histograms and counters of what passes through this process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._routed = Counter("modm_routed", "Requests routed", ["route", "policy"], registry=r)
        self._similarity = Histogram(
            "modm_similarity", "Text-to-image cosine of the best source", buckets=SIMILARITIES, registry=r
        )
        self._skipped = Histogram("modm_skipped_steps", "Steps skipped by hits", buckets=STEPS, registry=r)
        self._latency = Histogram(
            "modm_latency_seconds", "From intended arrival to the image", ["route"], buckets=SECONDS, registry=r
        )
        self._wait = Histogram(
            "modm_queue_wait_seconds", "From intended arrival to the claim", ["route"], buckets=SECONDS, registry=r
        )
        self._gpu = Histogram(
            "modm_gpu_seconds", "Seconds of a worker per image", ["model", "route"], buckets=SECONDS, registry=r
        )
        self._score = Histogram(
            "modm_clip_score", "Image-to-prompt cosine", ["route"], buckets=SIMILARITIES, registry=r
        )
        self._escalated = Counter("modm_escalated", "Hits drawn again by the large model", registry=r)
        self._hit_age = Histogram("modm_hit_age_seconds", "Age of the source of a hit", buckets=HOUR, registry=r)

    def routed(self, record: RequestRecord, decision: Decision) -> None:
        self._routed.labels(decision.route.value, decision.policy).inc()
        if decision.similarity is not None:
            self._similarity.observe(decision.similarity)
        if decision.source_id is not None:
            self._skipped.observe(decision.skipped_steps)

    def hit_age(self, age_s: float) -> None:
        self._hit_age.observe(max(0.0, age_s))

    def finished(self, record: RequestRecord) -> None:
        route = record.decision.route.value if record.decision else "unknown"
        if record.latency_s is not None:
            self._latency.labels(route).observe(record.latency_s)
        if record.queue_wait_s is not None:
            self._wait.labels(route).observe(record.queue_wait_s)
        if record.clip_score is not None:
            self._score.labels(route).observe(record.clip_score)
        if record.completion is not None:
            self._gpu.labels(record.completion.model, route).observe(record.completion.gpu_s)
            if record.completion.escalated:
                self._escalated.inc()


#: field of the window -> (metric, help)
WINDOW = {
    "arrivals": ("modm_window_arrivals", "Requests accepted in the window"),
    "hits": ("modm_window_hits", "Hits in the window"),
    "misses": ("modm_window_misses", "Misses in the window"),
    "done": ("modm_window_done", "Requests finished in the window"),
    "failed": ("modm_window_failed", "Requests failed in the window"),
    "refused": ("modm_window_refused", "Submits refused in the window"),
    "retries": ("modm_window_retries", "Attempts repeated in the window"),
    "rerouted": ("modm_window_rerouted", "Hits sent to the large model after all, in the window"),
    "waited": ("modm_window_waited", "Requests that waited on an unfinished source, in the window"),
    "rebound": ("modm_window_rebound", "Queued requests that a new image made hits, or better ones, in the window"),
}


class LedgerCollector:
    """Reads the ledger when scraped. A ledger that is away gives ``modm_up 0`` and nothing else."""

    def __init__(self, ledger: Ledger, cache: ImageCache, settings: Settings) -> None:
        self.ledger, self.cache, self.settings = ledger, cache, settings

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("modm_up", "Whether the ledger answers")
        try:
            found = list(self._collect())
        except ModmError as error:
            log.warning("metrics: %s", error)
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from found

    def _collect(self) -> Iterator[Metric]:
        counts = self.ledger.counts()
        requests = GaugeMetricFamily("modm_requests", "Requests by state", labels=["state"])
        for name in ("open", "accepted", "running", "waiting", "failed", "unadmitted"):
            requests.add_metric([name], counts[name])
        yield requests
        depth = GaugeMetricFamily("modm_queue_depth", "Ready requests by queue", labels=["queue"])
        for queue in ("large-gen", "small-refine"):
            depth.add_metric([queue], counts[f"ready:{queue}"])
        yield depth
        yield from self._window()
        yield from self._workers()
        size = GaugeMetricFamily("modm_cache_images", "Cached images", labels=["namespace"])
        for namespace in self.cache.namespaces():
            size.add_metric([namespace], self.cache.count(namespace))
        yield size
        yield GaugeMetricFamily("modm_cache_capacity", "Images kept per namespace", value=self.settings.cache.capacity)

    def _window(self) -> Iterator[Metric]:
        control, controller = self.ledger.control(), self.settings.controller
        window = self.ledger.window(
            window_s=controller.window_s, bucket_s=control.bucket_s or controller.bucket_s, now_s=self.ledger.now_s()
        )
        for field, (name, text) in WINDOW.items():
            yield GaugeMetricFamily(name, text, value=window.get(field, 0.0))
        routed = window.get("hits", 0.0) + window.get("misses", 0.0)
        hit_rate = window.get("hits", 0.0) / routed if routed else 0.0
        yield GaugeMetricFamily("modm_hit_rate", "Share of hits in the window", value=hit_rate)
        total = window.get("slo_total", 0.0)
        met = 1 - window.get("slo_missed", 0.0) / total if total else 1.0
        yield GaugeMetricFamily("modm_slo_attainment", "Share of the window's requests within their SLO", value=met)
        yield GaugeMetricFamily("modm_degradation", "Steps of quality given up", value=control.degradation)

    def _workers(self) -> Iterator[Metric]:
        workers, roles = self.ledger.workers(), self.ledger.desired_roles()
        yield GaugeMetricFamily(
            "modm_workers_ready", "Workers whose GPU child says that it is ready", value=len(workers)
        )
        by_role = GaugeMetricFamily("modm_workers_by_role", "Ready workers by desired role", labels=["role"])
        for role in ("large", "small"):
            by_role.add_metric([role], sum(1 for w in workers if w.worker in roles and roles[w.worker].role == role))
        yield by_role
        resident = GaugeMetricFamily("modm_model_resident", "Models in device memory", labels=["worker", "model"])
        unwell = GaugeMetricFamily("modm_worker_unwell", "Workers that say they are unwell", labels=["worker"])
        for worker in workers:
            unwell.add_metric([worker.worker], 0 if worker.unwell is None else 1)
            for model in worker.models:
                resident.add_metric([worker.worker, model], 1)
        yield resident
        yield unwell
        step = GaugeMetricFamily("modm_step_seconds", "Learned seconds per step", labels=["model"])
        for model, seconds in self.ledger.step_s().items():
            step.add_metric([model], seconds)
        yield step


def build_registry(ledger: Ledger, cache: ImageCache, settings: Settings, observer: Observer) -> CollectorRegistry:
    """The registry to render: the observer's own, with the ledger's collector added once."""
    observer.registry.register(LedgerCollector(ledger, cache, settings))
    return observer.registry
