"""The controller's Prometheus endpoint: what it sees, what it decided, what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from modm_tasks.cluster import DesiredRole
from modm_tasks.errors import UnavailableError
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE
from modm_tasks.settings import Settings
from orchestrator.controller.reconcile import Round
from orchestrator.controller.rules import Rules
from orchestrator.decisions.snapshot import Allocation, ClusterSnapshot

MOVE_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """One registry per controller, so that several may live in one process (tests do that)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        its = self.registry
        self.leading = Gauge("modm_controller_leading", "1 while this controller leads", registry=its)
        self.roles = Gauge("modm_workers", "Workers by desired role and state", ["role", "state"], registry=its)
        self.target = Gauge("modm_controller_large_target", "Large workers decided last", registry=its)
        self.backlog = Gauge("modm_backlog_requests", "Requests that wait, by queue", ["queue"], registry=its)
        self.backlog_s = Gauge(
            "modm_backlog_gpu_seconds", "Predicted GPU seconds of waiting work", ["queue"], registry=its
        )
        self.arrivals = Gauge("modm_arrivals_per_min", "Arrivals in the window", registry=its)
        self.hit_rate = Gauge("modm_hit_rate", "Share of hits in the window", registry=its)
        self.degradation = Gauge("modm_degradation", "Steps of quality given up", registry=its)
        self.decisions = Counter("modm_controller_decisions", "Decisions made", ["allocation"], registry=its)
        self.moves = Counter("modm_role_moves", "Role moves verified", registry=its)
        self.repairs = Counter("modm_role_repairs", "Workers brought back to their queues", registry=its)
        self.failures = Counter(
            "modm_reconcile_failures", "Workers that did not reach their queues in a round", registry=its
        )
        self.outages = Counter("modm_controller_outages", "Times Redis or the broker went away", registry=its)
        self.move_s = Histogram(
            "modm_role_move_seconds", "From decision to verified role", buckets=MOVE_BUCKETS_S, registry=its
        )

    def serve(self, settings: Settings) -> Callable[[], None]:
        """Listen where the settings say; returns what ends it. Raises UnavailableError where the port is in use."""
        host, port = settings.controller.metrics_host, settings.controller.metrics_port
        if not port:
            return lambda: None
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise UnavailableError(f"controller.metrics_port {port} on {host}: {error.strerror}") from error

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(timeout=5)

        return close

    def saw(self, found: Round) -> None:
        """One round of the reconciler."""
        self.moves.inc(len(found.moves))
        self.repairs.inc(len(found.repaired))
        self.failures.inc(len(found.failed) + len(found.silent))
        for took_s in found.took_s.values():
            self.move_s.observe(took_s)

    def decided(self, rules: Rules, snapshot: ClusterSnapshot, choice: Allocation) -> None:
        """One decision and what it was based on."""
        self.decisions.labels(rules.allocation).inc()
        self.target.set(choice.n_large)
        self.arrivals.set(snapshot.arrivals_per_min)
        self.hit_rate.set(snapshot.hit_rate)
        self.backlog_s.labels(LARGE_GEN).set(snapshot.backlog_large_s)
        self.backlog_s.labels(SMALL_REFINE).set(snapshot.backlog_small_s)

    def workers(self, desired: Mapping[str, DesiredRole], ready: set[str], unwell: set[str]) -> None:
        """Counts by role and state."""
        self.roles.clear()
        for name, wanted in desired.items():
            away = "ready" if name in ready else "away"
            state = "drained" if wanted.drained else "unwell" if name in unwell else away
            self.roles.labels(wanted.role, state).inc()
