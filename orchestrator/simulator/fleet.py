"""Simulated workers and their two queues."""

from __future__ import annotations

from heapq import heappop, heappush

from modm_tasks.queues import LARGE_GEN, ROLE_QUEUES, SMALL_REFINE, Mode, Role
from orchestrator.simulator.config import WorkersMode

QUEUES = (LARGE_GEN, SMALL_REFINE)


class Queue:
    """Ranked requests, the lowest first. An entry is dropped when its request has been put elsewhere since."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._work: dict[int, tuple[float, float]] = {}
        self.work_s = 0.0

    def __len__(self) -> int:
        return len(self._work)

    def __contains__(self, request: int) -> bool:
        return request in self._work

    def put(self, request: int, rank: float, service_s: float) -> None:
        self.remove(request)
        self._work[request] = (rank, service_s)
        self.work_s += service_s
        heappush(self._heap, (rank, request))

    def remove(self, request: int) -> None:
        held = self._work.pop(request, None)
        if held is not None:
            self.work_s -= held[1]

    def head(self) -> tuple[float, int] | None:
        """The first (rank, request)."""
        heap, work = self._heap, self._work
        while heap:
            rank, request = heap[0]
            held = work.get(request)
            if held is not None and held[0] == rank:
                return heap[0]
            heappop(heap)
        return None

    def pop(self) -> int | None:
        head = self.head()
        if head is None:
            return None
        heappop(self._heap)
        self.remove(head[1])
        return head[1]

    def rank(self, request: int) -> float:
        return self._work[request][0]

    def service_s(self, request: int) -> float:
        return self._work[request][1]


class Fleet:
    """Which worker is idle, busy, large, small. Knows no time."""

    def __init__(self, gpus: int, mode: WorkersMode, n_large: int) -> None:
        self.mode = mode
        self.queues = {name: Queue() for name in QUEUES}
        self.roles: list[Role] = ["large" if i < n_large else "small" for i in range(gpus)]
        self.n_large = n_large
        self.busy = [False] * gpus
        self.n_busy = 0
        #: By role: idle workers, the longest idle first, with the number of the moment since which they are.
        self._idle: dict[Role, dict[int, int]] = {"large": {}, "small": {}}
        self._moment = 0
        for worker in range(gpus):
            self._rest(worker)
        queue_mode: Mode = "roles" if mode == "roles" else "pooled"
        self._order: dict[Role, tuple[str, ...]] = {
            "large": ROLE_QUEUES[queue_mode, "large"],
            "small": ROLE_QUEUES[queue_mode, "small"],
        }

    def is_idle(self, role: Role) -> bool:
        """Whether some worker of the role has nothing to do."""
        return bool(self._idle[role])

    def take_worker(self, queue: str) -> int | None:
        """An idle worker that serves ``queue``, whatever its role; it is busy then. The one that waits the longest, as Redis
        gives to blocked readers: an idle large worker draws a hit though a small one idles too."""
        found = [
            (next(iter(idle.items()))[::-1], role)
            for role, idle in self._idle.items()
            if idle and (self.mode == "pooled" or queue in self._order[role])
        ]
        if not found:
            return None
        (_, worker), role = min(found)
        del self._idle[role][worker]
        self.busy[worker] = True
        self.n_busy += 1
        return worker

    def _rest(self, worker: int) -> None:
        self._moment += 1
        self._idle[self.roles[worker]][worker] = self._moment

    def next_for(self, worker: int) -> tuple[int, str] | None:
        """What ``worker`` should draw next: (request, queue), taken out of the queue."""
        if self.mode == "pooled":
            heads = [(head, name) for name, queue in self.queues.items() if (head := queue.head()) is not None]
            if not heads:
                return None
            name = min(heads)[1]
            request = self.queues[name].pop()
            return None if request is None else (request, name)
        for name in self._order[self.roles[worker]]:
            request = self.queues[name].pop()
            if request is not None:
                return request, name
        return None

    def release(self, worker: int) -> None:
        self.busy[worker] = False
        self.n_busy -= 1
        self._rest(worker)

    def occupy(self, worker: int) -> None:
        """An idle worker takes work by itself (after a move)."""
        del self._idle[self.roles[worker]][worker]
        self.busy[worker] = True
        self.n_busy += 1

    def set_role(self, worker: int, role: Role) -> None:
        old = self.roles[worker]
        self.roles[worker] = role
        if not self.busy[worker]:
            del self._idle[old][worker]
            self._rest(worker)
        self.n_large += (role == "large") - (old == "large")
