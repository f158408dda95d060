"""The simulated rate controller: a snapshot, a decision, roles, every period."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modm_tasks.queues import LARGE_GEN, SMALL_REFINE
from orchestrator.decisions.allocation import overload
from orchestrator.decisions.allocation.assign import assign_roles
from orchestrator.decisions.allocation.registry import allocate
from orchestrator.decisions.snapshot import ClusterSnapshot, PolicyState
from orchestrator.simulator.config import SimConfig

if TYPE_CHECKING:
    from orchestrator.simulator.engine import Simulation


class Controller:
    """Ticks every ``period_s``, whether or not requests arrive."""

    def __init__(self, config: SimConfig, simulation: Simulation) -> None:
        self.config, self.sim = config, simulation
        self.state = PolicyState()
        self.next_s = config.period_s
        self.names = [f"gpu{i:05d}" for i in range(config.gpus)]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.history: list[dict[str, Any]] = []
        self.moves = 0
        self.load_workers = (0.0, 0.0)

    def snapshot(self) -> ClusterSnapshot:
        c, sim, fleet = self.config, self.sim, self.sim.fleet
        totals = sim.windows.totals(sim.now)
        per_min, forecast = sim.windows.rates(sim.now, c.period_s / 2)
        hist = {int(name[2:]): float(count) for name, count in totals.items() if name.startswith("k:")}
        hits, misses = sum(hist.values()), totals["misses"]
        large, small = fleet.queues[LARGE_GEN], fleet.queues[SMALL_REFINE]
        first_large, first_small = large.head(), small.head()
        running_s = max(0.0, sim.end_sum - fleet.n_busy * sim.now)
        return ClusterSnapshot(
            now_s=sim.now,
            n_workers=c.gpus,
            n_large=fleet.n_large,
            large_s=sim.large_s * sim.steps / c.total_steps,
            small_s=sim.small_s,
            total_steps=c.total_steps,
            arrivals_per_min=per_min,
            forecast_per_min=forecast if c.allocation == "slo" else None,
            hit_rate=hits / (hits + misses) if hits + misses else 0.0,
            k_histogram=hist,
            backlog_large=len(large),
            backlog_small=len(small),
            backlog_large_s=large.work_s if len(large) else 0.0,
            backlog_small_s=small.work_s if len(small) else 0.0,
            oldest_large_s=0.0 if first_large is None else max(0.0, sim.now - sim.rank[first_large[1]]),
            oldest_small_s=0.0 if first_small is None else max(0.0, sim.now - sim.rank[first_small[1]]),
            running_s=(running_s,),
            slo_s=c.slo_s,
            min_dwell_s=c.min_dwell_s,
            switch_s=c.switch_s,
            period_s=c.period_s,
            pooled=c.workers != "roles",
            static_large=c.static_large,
            degrade=c.degrade,
            floor_threshold_rungs=c.floor_threshold_rungs,
            floor_steps=c.floor_steps,
            faster_small_s=c.faster_small_s,
        )

    def tick(self) -> None:
        sim, c = self.sim, self.config
        seen = self.snapshot()
        decision, self.state = allocate(c.allocation, seen, self.state, variant=c.variant)
        self.load_workers = (
            seen.miss_per_min * seen.large_s / 60, seen.hit_work_per_min * seen.small_s / 60
        )  # fmt: skip
        level = overload.levels_of(seen)[decision.degradation]
        faster = c.faster_small_s if level.faster_small and c.faster_small_s else c.small_s
        sim.apply_level(level, faster)
        if decision.refuse_s > 0:
            sim.refuse_until = sim.now + min(decision.refuse_s, c.period_s)
        moved = self._move(decision.n_large) if c.workers != "pooled" else 0
        self.history.append(
            {"at_s": sim.now, "n_large": sim.fleet.n_large, "target": decision.target, "moved": moved,
             "arrivals_per_min": seen.arrivals_per_min, "hit_rate": seen.hit_rate, "backlog_large": seen.backlog_large,
             "backlog_small": seen.backlog_small, "degradation": decision.degradation, "reason": decision.reason}
        )  # fmt: skip
        self.next_s += c.period_s

    def _move(self, n_large: int) -> int:
        fleet = self.sim.fleet
        if n_large == fleet.n_large:
            return 0
        current = dict(zip(self.names, fleet.roles, strict=True))
        ends = {
            name: end - self.sim.now
            for name, busy, end in zip(self.names, fleet.busy, self.sim.ends, strict=True) if busy
        }  # fmt: skip
        wanted = assign_roles(self.names, n_large, current, ends)
        changed = [self.index[name] for name, role in wanted.items() if role != current[name]]
        for worker in changed:
            fleet.set_role(worker, wanted[self.names[worker]])
            if self.config.switch_s > 0:
                self.sim.switching.add(worker)
        for worker in changed:
            self.sim.wake(worker)
        self.moves += len(changed)
        return len(changed)
