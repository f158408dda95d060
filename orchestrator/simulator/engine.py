"""The event loop: arrivals, completions, controller ticks and patience, in virtual time. Time 0 is the first decision.

The router, ladder, ranks, allocation and role assignment are the production functions; only drawing takes modelled time.
Service time of a hit: small_s (1 - k/T); of a large worker's spare hit under the published roles: large_s (1 - k/T).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from modm_tasks import verification
from modm_tasks.messages import Decision, Route
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE
from orchestrator.decisions import routing
from orchestrator.decisions.allocation import overload
from orchestrator.simulator.cache import Cache
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.control import Controller
from orchestrator.simulator.fleet import Fleet
from orchestrator.simulator.outcome import Outcome
from orchestrator.simulator.router import DONE, NEW, QUEUED, REFUSED, RUNNING, WAITING, SimulatedRouter
from orchestrator.simulator.similarity import Similarities
from orchestrator.simulator.windows import Windows

_DONE_EVENT, _TIRED_EVENT = 0, 1


class Simulation:
    """One run. ``arrivals_s`` are ascending; request r is row ``warm + r`` of ``source``."""

    def __init__(
        self, config: SimConfig, source: Similarities, arrivals_s: Sequence[float], *, concurrency: int = 0
    ) -> None:
        """``concurrency`` > 0: a closed loop; the times are ignored and each end lets the next request arrive."""
        self.config, self.source, self.concurrency = config, source, concurrency
        #: When the users of a closed loop send their next requests; it only grows, as time does.
        self.slots = deque([0.0] * concurrency)
        self.arrivals = [float(t) for t in arrivals_s]
        n, warm = max(source.n, source.warm + len(self.arrivals)), source.warm
        self.now = 0.0
        self.state = [DONE] * warm + [NEW] * (n - warm)
        self.cache = Cache(n, config.cache_capacity, config.cache_eviction)
        self.depth = [0] * n
        self.chain = [0] * n
        self.waiters: dict[int, list[int]] = {}
        self.decisions: list[Decision | None] = [None] * n
        self.rank = [0.0] * n
        self.saved_s: dict[int, float] = {}
        self.turn_s: dict[int, float] = {}
        self.large_s, self.small_s, self.steps = config.large_s, config.small_s, config.total_steps
        self.lowered = 0
        self.refuse_until = 0.0
        self.fleet = Fleet(config.gpus, config.workers, self._first_large())
        self.end_sum = 0.0
        #: By worker: when it ends what it draws, or has ended.
        self.ends = [0.0] * config.gpus
        self.switching: set[int] = set()
        self.windows = Windows(config.window_s, config.bucket_s)
        self.router = SimulatedRouter(self)
        self.controller = Controller(config, self) if config.workers != "pooled" or config.degrade else None
        self.outcome = Outcome(config, self.arrivals, warm)
        self._events: list[tuple[float, int, int, int]] = []
        self._seq = 0
        self._chance = np.random.default_rng(config.seed + 1)
        self._times = np.random.default_rng(config.seed + 2)
        self._hits = self._escalated = 0
        for row in range(warm):
            self.cache.add(row, self.now)

    def _first_large(self) -> int:
        """As the controller begins: all large, as the reference's quality scripts, else all but one (A7)."""
        c = self.config
        if c.allocation == "static":
            return min(c.gpus, c.static_large)
        return c.gpus if c.allocation == "modm-quality" else max(1, c.gpus - 1)

    def run(self) -> Outcome:
        """Until the last request has ended."""
        arrivals, events, warm = self.arrivals, self._events, self.source.warm
        total, next_arrival = len(arrivals), 0
        controller, front_s = self.controller, self.config.front_s
        tick_s = controller.next_s if controller else float("inf")
        while True:
            at = arrivals[next_arrival] + front_s if next_arrival < total else float("inf")
            if self.concurrency and next_arrival < total:
                at = self.slots[0] + front_s if self.slots else float("inf")
            event_s = events[0][0] if events else float("inf")
            if at == event_s == float("inf"):
                break
            if tick_s <= min(at, event_s) and controller is not None:
                self.now = tick_s
                controller.tick()
                tick_s = controller.next_s
            elif event_s <= at:
                self.now, _, kind, row = heappop(events)
                if kind == _DONE_EVENT:
                    self._finished(row)
                else:
                    self._tired(row)
            else:
                self.now = at
                if self.concurrency:
                    self.slots.popleft()
                self._arrived(warm + next_arrival)
                next_arrival += 1
        self.outcome.close(self)
        return self.outcome

    # --- events -------------------------------------------------------------------------------------------------

    def _arrived(self, row: int) -> None:
        self.windows.count(self.now, "arrivals")
        self.rank[row] = self.now
        self.outcome.arrival[row] = self.now - self.config.front_s
        decision = self.router.decide(row, inflight=True)
        if self._refused(row, decision):
            return
        if decision.route is Route.STORED:
            self.state[row] = DONE
            self._ended()
            self.outcome.stored(row, self.now, decision)
            return
        if decision.waits_on is not None:
            self._wait(row, decision)
        else:
            self._enqueue(row, decision)

    def _ended(self) -> None:
        if self.concurrency:
            self.slots.append(self.now + self.config.turnaround_s)

    def _refused(self, row: int, decision: Decision) -> bool:
        c = self.config
        if self.now < self.refuse_until:
            retry_s = self.refuse_until - self.now
        elif c.admit:
            wait = self.router.wait_ahead_s(decision)
            retry_s = overload.admit(wait_s=wait, service_s=self.router.service_s(decision), slo_s=c.slo_s)
        else:
            return False
        if retry_s <= 0:
            return False
        self.state[row] = REFUSED
        self._ended()
        self.windows.count(self.now, "refused")
        self.outcome.refused(row, self.now, retry_s)
        return True

    def _wait(self, row: int, decision: Decision) -> None:
        source = int(decision.waits_on or 0)
        self.state[row] = WAITING
        self.decisions[row] = decision
        self.chain[row] = self.chain[source] + 1
        self.waiters.setdefault(source, []).append(row)
        self.outcome.waited[row] = True
        # A bound counted from now instead undoes in-flight reuse at saturation, where the turn itself is far away.
        self._push(self.now + self.config.wait_bound_s, _TIRED_EVENT, row)
        self._hasten(source, self.large_s - self.router.service_s(decision))

    def _hasten(self, source: int, saved_s: float) -> None:
        """A source that is waited on goes first in proportion to the work that it saves; what it waits on itself inherits
        that, or a source could stay behind its own waiters."""
        decision = self.decisions[source]
        if self.state[source] == WAITING and decision is not None and decision.waits_on is not None:
            self._hasten(int(decision.waits_on), saved_s)
        self.saved_s[source] = self.saved_s.get(source, 0.0) + saved_s
        for queue in self.fleet.queues.values():
            if source in queue:
                rank = routing.hastened(queue.rank(source), saved_s=saved_s, n_workers=self.config.gpus)
                queue.put(source, rank, queue.service_s(source))
                return

    def _enqueue(self, row: int, decision: Decision) -> None:
        """Queue it at its own rank and start it at once where a worker is idle."""
        self.state[row] = QUEUED
        self.decisions[row] = decision
        service = self.router.service_s(decision)
        queue = LARGE_GEN if decision.route is Route.LARGE_GEN else SMALL_REFINE
        rank = self._rank(row, service)
        worker = self.fleet.take_worker(queue)
        if worker is None:
            self.fleet.queues[queue].put(row, rank, service)
        else:
            self._start(worker, row, idle=True)

    def _rank(self, row: int, service_s: float) -> float:
        rank = self.rank[row]
        if "deadline" in self.config.features:
            rank = routing.slack_rank(accepted_s=rank, deadline_s=self.config.slo_s, service_s=service_s)
        if row in self.saved_s:
            rank = routing.hastened(rank, saved_s=self.saved_s[row], n_workers=self.config.gpus)
        return rank

    def _start(self, worker: int, row: int, *, idle: bool = False) -> None:
        decision = self.decisions[row]
        assert decision is not None
        large = decision.route is Route.LARGE_GEN or (
            self.fleet.mode == "roles" and self.fleet.roles[worker] == "large" and decision.source_id is not None
        )
        service = self.router.service_s(decision, large=large)
        c = self.config
        if c.alone_share < 1 and c.gpus > 1:
            service *= c.alone_share + (1 - c.alone_share) * (self.fleet.n_busy - 1) / (c.gpus - 1)
        if factors := c.large_spread if large else c.small_spread:
            service *= factors[int(self._times.integers(len(factors)))]
        service += c.claim_s if idle else c.gap_s
        if worker in self.switching:
            self.switching.discard(worker)
            service += self.config.switch_s
        if self._escalates(row, decision, service):
            service += self.large_s
            self.outcome.escalated[row] = True
        self.state[row] = RUNNING
        self.outcome.started(row, self.now, decision, large=large)
        end = self.now + service
        self.end_sum += end
        self.ends[worker] = end
        self.outcome.worker[row] = worker
        self._push(end, _DONE_EVENT, row)

    def _finished(self, row: int) -> None:
        worker = int(self.outcome.worker[row])
        self.end_sum -= self.now
        self.state[row] = DONE
        self._ended()
        decision = self.decisions[row]
        assert decision is not None
        self.outcome.finished(row, self.now)
        generated = decision.route is Route.LARGE_GEN or bool(self.outcome.escalated[row])
        self.depth[row] = 0 if generated else decision.source_depth + 1
        enters = generated or self.config.cache_admission == "all"
        if enters:
            self.cache.add(row, self.now)
        for waiter in self.waiters.pop(row, ()):
            if self.state[waiter] == WAITING:
                self._after_wait(waiter)
        if enters and "late-binding" in self.config.features:
            self._rebind(row)
        given = self.fleet.next_for(worker)
        if given is None:
            self.fleet.release(worker)
        else:
            self._start(worker, given[0])

    def _tired(self, row: int) -> None:
        if self.state[row] != WAITING:
            return
        if self.config.wait_bound_from_turn:
            if self._turn_is_ahead(row):
                self._push(self.now + self.config.wait_bound_s / 4, _TIRED_EVENT, row)
                return
            since = self.turn_s.setdefault(row, self.now)
            if self.now < since + self.config.wait_bound_s:
                self._push(since + self.config.wait_bound_s, _TIRED_EVENT, row)
                return
        self.outcome.tired += 1
        self._after_wait(row)

    def _turn_is_ahead(self, row: int) -> bool:
        """Whether an earlier request still waits for a worker: then this one would not be drawn either."""
        decision = self.decisions[row]
        assert decision is not None
        rank = self._rank(row, self.router.service_s(decision))
        heads = (queue.head() for queue in self.fleet.queues.values())
        return any(head is not None and head < (rank, row) for head in heads)

    def _after_wait(self, row: int) -> None:
        """The true similarity decides, at the place in the order that the request had."""
        decision = self.router.decide(row, inflight=False)
        self.chain[row] = 0
        if decision.route is Route.STORED:
            self.state[row] = DONE
            self._ended()
            self.outcome.stored(row, self.now, decision)
        else:
            self._enqueue(row, decision)

    def _rebind(self, image: int) -> None:
        """Queued requests that the new image makes hits, or better ones."""
        for row, _ in self.source.readers(image):
            queue = next((q for q in self.fleet.queues.values() if row in q), None)
            known = self.decisions[row]
            if self.state[row] != QUEUED or queue is None or known is None:
                continue
            decision = self.router.decide(row, inflight=False)
            if decision.source_id is not None and decision.skipped_steps > known.skipped_steps:
                queue.remove(row)
                self.outcome.rebound[row] = True
                self._enqueue(row, decision)

    def wake(self, worker: int) -> None:
        """An idle worker has a new role: it looks into its queues."""
        given = None if self.fleet.busy[worker] else self.fleet.next_for(worker)
        if given is not None:
            self.fleet.occupy(worker)
            self._start(worker, given[0])

    def _push(self, at_s: float, kind: int, row: int) -> None:
        self._seq += 1
        heappush(self._events, (at_s, self._seq, kind, row))

    def _escalates(self, row: int, decision: Decision, service_s: float) -> bool:
        if decision.source_id is None or "verify" not in self.config.features:
            return False
        self._hits += 1
        # Quality is not simulated: a set share of the refined images is taken to score below the floor.
        score = 0.0 if self._chance.random() < self.config.verify_share else 1.0
        load = verification.Load(
            hits=self._hits,
            escalated=self._escalated,
            wait_s=self.router.queue_wait_s(),
            slo_s=self.config.slo_s,
            age_s=self.now + service_s - float(self.outcome.arrival[row]),
            large_s=self.large_s,
        )
        escalates = verification.may_escalate(score, 0.5, load, rate=self.config.escalation_rate)
        self._escalated += escalates
        return escalates

    def apply_level(self, level: overload.Level, small_s: float) -> None:
        """What the controller's degradation means for requests routed from now on."""
        self.lowered, self.steps, self.small_s = level.threshold_rungs, level.large_steps, small_s
