"""The router of a simulated run: gathers what the pure router needs, as the production one does, and asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modm_tasks.messages import Decision, Route, SubmitRequest
from modm_tasks.queues import LARGE_GEN, SMALL_REFINE
from orchestrator.decisions import routing
from orchestrator.decisions.allocation import overload

if TYPE_CHECKING:
    from orchestrator.simulator.engine import Simulation

NEW, WAITING, QUEUED, RUNNING, DONE, REFUSED = range(6)
_REQUEST = SubmitRequest(prompt="simulated")
#: The production router's guess at an average hit, as a share of a full small image.
_HIT_SHARE = 0.6


class SimulatedRouter:
    """Reads the state of its simulation, changes none of it but the windows and when an image was last used."""

    def __init__(self, simulation: Simulation) -> None:
        self.sim = simulation

    def wait_ahead_s(self, decision: Decision) -> float:
        """Predicted wait of a request that is queued now, by the workers that serve its queue."""
        sim = self.sim
        fleet, queues = sim.fleet, sim.fleet.queues
        running_s = sim.end_sum - fleet.n_busy * sim.now
        large, small = queues[LARGE_GEN].work_s, queues[SMALL_REFINE].work_s
        if fleet.n_busy < sim.config.gpus and fleet.mode != "roles":
            return 0.0
        if fleet.mode == "pooled":
            return (large + small + running_s) / sim.config.gpus
        running_large_s = sum(
            end - sim.now
            for end, role, busy in zip(sim.ends, fleet.roles, fleet.busy, strict=True)
            if busy and role == "large"
        )
        running_small_s = running_s - running_large_s
        n_large, n_small = fleet.n_large, sim.config.gpus - fleet.n_large
        miss_load, hit_load = sim.controller.load_workers if sim.controller else (0.0, 0.0)
        miss = overload.ClassLoad(workers=n_large, work_s=large + running_large_s, arriving=miss_load)
        if fleet.mode == "pooled-roles":
            hit = overload.ClassLoad(workers=n_small, work_s=small + running_small_s, arriving=hit_load)
            pair = (miss, hit) if decision.route is Route.LARGE_GEN else (hit, miss)
            # The mean of the careful guess and of one queue over all: by itself the careful one refuses at low load.
            return (overload.pooled_wait_s(*pair) + (large + small + running_s) / sim.config.gpus) / 2
        if decision.route is Route.LARGE_GEN:
            return 0.0 if fleet.is_idle("large") else (large + running_large_s) / max(1, n_large)
        if fleet.is_idle("small") or fleet.is_idle("large"):
            return 0.0
        if n_small == 0:  # hits are drawn when no miss waits, with the large model
            return overload.pooled_wait_s(overload.ClassLoad(workers=0, work_s=small * sim.large_s / sim.small_s), miss)
        return (small + running_small_s) / n_small

    def decide(self, row: int, *, inflight: bool) -> Decision:
        """The decision of one request now; counted in the windows unless it waits."""
        sim, c = self.sim, self.sim.config
        decision = routing.route(
            routing.RouteInput(
                request=_REQUEST,
                policy=c.policy,
                features=c.features,
                ladder=c.ladder,
                total_steps=sim.config.total_steps,
                found=self._found(row),
                unfinished=self._unfinished(row) if inflight and "inflight" in c.features else None,
                large_service_s=sim.large_s,
                small_service_s=sim.small_s,
                miss_wait_s=self.queue_wait_s(),
                lowered_rungs=sim.lowered,
                repeat_max_k=c.repeat_max_k,
                wait_depth=c.wait_depth,
            )
        )
        if decision.waits_on is None:
            if decision.source_id is not None:
                sim.cache.used(int(decision.source_id), sim.now, decision.skipped_steps)
            sim.windows.count(sim.now, "misses" if decision.route is Route.LARGE_GEN else f"k:{decision.skipped_steps}")
        return decision

    def _found(self, row: int) -> routing.Found | None:
        sim = self.sim
        bounded = "drift" in sim.config.features
        for j, similarity in sim.source.images(row):
            if (sim.cache.here[j] or sim.source.always_cached) and not (
                bounded and sim.depth[j] > sim.config.max_depth
            ):
                same = "repeats" in sim.config.features and sim.source.same_text(row, j)
                return routing.Found(id=str(j), uri="", similarity=similarity, depth=sim.depth[j], same_prompt=same)
        return None

    def _unfinished(self, row: int) -> routing.Unfinished | None:
        """As the production router: the most similar earlier open request whose chain is not too long."""
        sim = self.sim
        ladder, state = sim.config.ladder, sim.state
        for j, similarity in sim.source.texts(row):
            if j < row and WAITING <= state[j] <= RUNNING and sim.chain[j] < sim.config.wait_depth:
                decision = sim.decisions[j]
                miss = decision is not None and decision.route is Route.LARGE_GEN
                service = sim.large_s if miss else sim.small_s
                waited = sim.now - sim.rank[j]
                ready = max(0.0, self.queue_wait_s() - waited) + service
                return routing.Unfinished(
                    id=str(j), predicted=ladder.predict(similarity), ready_in_s=ready, chain_depth=sim.chain[j]
                )
        return None

    def queue_wait_s(self) -> float:
        sim = self.sim
        queues = sim.fleet.queues
        hits = len(queues[SMALL_REFINE]) * sim.small_s * _HIT_SHARE
        return (len(queues[LARGE_GEN]) * sim.large_s + hits) / sim.config.gpus

    def service_s(self, decision: Decision, *, large: bool = False) -> float:
        """Seconds of drawing. ``large``: a hit is refined by the large model. Degradation shortens misses only."""
        sim = self.sim
        c = sim.config
        share = 1 - decision.skipped_steps / c.total_steps
        if decision.route is Route.LARGE_GEN:
            share = sim.steps / c.total_steps
        drawn_large = large or decision.route is Route.LARGE_GEN
        image_s, fixed_s = (sim.large_s, c.large_fixed_s) if drawn_large else (sim.small_s, c.small_fixed_s)
        return c.overhead_s + fixed_s + (image_s - fixed_s) * share
