"""Which models are on the device, and what it costs to bring one there. Every figure is measured, none is assumed.

Three cases, the first that fits:

* all models fit in the budget together: all stay, and changing costs nothing;
* the idle one is *parked*: its weights stay in (pinned, under CUDA) host memory for good, and leaving the device is
  just dropping the device's copy, since weights never change; coming back is one copy over the bus;
* host memory does not suffice either: the idle one is dropped, and comes back by loading its files again.

Not thread safe, but for `resident` and `prices_s`, which other threads may read.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from modm_tasks.errors import OutOfMemoryError

log = logging.getLogger(__name__)

Parking = Literal["host", "reload", "none"]


class HasModules(Protocol):
    """What is kept resident: anything made of networks."""

    def modules(self) -> list[torch.nn.Module]: ...


def tensors(model: HasModules) -> dict[int, torch.Tensor]:
    """Every parameter and buffer, once, by identity."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensor in (*module.parameters(), *module.buffers()):
            found[id(tensor)] = tensor
    return found


def weight_bytes(model: HasModules) -> int:
    """Bytes of all weights and buffers."""
    return sum(t.numel() * t.element_size() for t in tensors(model).values())


@dataclass
class _Slot:
    load: Callable[[], Any]
    model: Any = None
    host: dict[int, torch.Tensor] = field(default_factory=dict)
    on_device: bool = False
    footprint: int = 0


class Residency:
    """Keeps models on ``device`` within ``budget`` bytes (None = no bound); ``working_bytes`` stay free for drawing.

    ``parking`` "none" is for weights that a library moves by itself (offload): they are loaded and left alone.
    """

    def __init__(self, device: torch.device, budget: int | None, *, parking: Parking = "host") -> None:
        self.device, self.budget, self.parking = device, budget, parking
        self.working_bytes = 0
        self._slots: dict[str, _Slot] = {}
        self._order: tuple[str, ...] = ()
        self._prices: dict[str, float] = {}

    def add(self, name: str, load: Callable[[], Any]) -> None:
        """Make a model known. ``load`` brings it into host memory."""
        self._slots.setdefault(name, _Slot(load))

    def resident(self) -> tuple[str, ...]:
        """Names on the device, the most recently used last."""
        return self._order

    def prices_s(self) -> dict[str, float]:
        """Measured seconds to make each known model resident the way it would be done now; 0 where all fit together."""
        return dict(self._prices)

    def footprint(self, name: str) -> int:
        """Bytes on the device, weights alone; 0 before the first load."""
        return self._slots[name].footprint

    def all_fit(self) -> bool:
        """Whether every known model can stay."""
        need = sum(slot.footprint for slot in self._slots.values()) + self.working_bytes
        return self.budget is None or need <= self.budget

    def ensure(self, name: str) -> tuple[Any, float]:
        """The model, on the device, and the seconds that took. Raises OutOfMemoryError where it cannot fit alone."""
        slot = self._slots[name]
        if slot.on_device:
            self._order = (*(n for n in self._order if n != name), name)
            return slot.model, 0.0
        began = time.perf_counter()
        if slot.model is None:
            slot.model = slot.load()
            slot.footprint = 0 if self.parking == "none" else weight_bytes(slot.model)
        self._make_room(name, slot.footprint)
        if self.parking != "none":
            self._bring(slot)
        slot.on_device = True
        _synchronise(self.device)
        took_s = time.perf_counter() - began
        self._order = (*self._order, name)
        self._note_price(name, took_s)
        return slot.model, took_s

    def release(self, name: str) -> None:
        """Take a model off the device, parked or dropped as the case is."""
        slot = self._slots[name]
        if not slot.on_device:
            return
        self._order = tuple(n for n in self._order if n != name)
        slot.on_device = False
        if self.parking == "host" and self._host_has_room(slot):
            self._park(slot)
        else:
            slot.model, slot.host = None, {}
            gc.collect()  # pipelines hold cycles; parked weights do not, and need no collection
        empty_cache(self.device)

    def measure_prices(self) -> None:
        """Swap every model in once where they do not all fit, so that prices are known before the first request."""
        if self.all_fit():
            self._prices = dict.fromkeys(self._slots, 0.0)
            return
        for name in (*self._slots, *self._slots):
            self.ensure(name)

    def _note_price(self, name: str, took_s: float) -> None:
        price = 0.0 if self.all_fit() else took_s
        known = self._prices.get(name)
        # The first arrival includes loading files; a parked model's later ones do not, so the newest counts most.
        self._prices = self._prices | {name: price if not known else 0.3 * known + 0.7 * price}

    def _make_room(self, name: str, need: int) -> None:
        if self.budget is None:
            return
        if need + self.working_bytes > self.budget:
            raise OutOfMemoryError(
                f"model {name!r} needs {_mib(need + self.working_bytes)} MiB and the device has {_mib(self.budget)}:"
                " use a smaller model, worker.quantise or worker.offload"
            )
        used = sum(self._slots[n].footprint for n in self._order)
        for other in self._order:
            if used + need + self.working_bytes <= self.budget:
                return
            used -= self._slots[other].footprint
            self.release(other)

    def _bring(self, slot: _Slot) -> None:
        for key, tensor in tensors(slot.model).items():
            # A parked tensor is copied (also CPU to CPU); one fresh from its file is moved, and there is only one.
            host = slot.host.get(key)
            if host is not None:
                tensor.data = host.to(self.device, non_blocking=True, copy=True)
            else:
                tensor.data = tensor.data.to(self.device, non_blocking=True)

    def _park(self, slot: _Slot) -> None:
        pin = self.device.type == "cuda"
        for key, tensor in tensors(slot.model).items():
            if key not in slot.host:
                held = tensor.data.to("cpu", copy=True)
                slot.host[key] = held.pin_memory() if pin else held
            tensor.data = slot.host[key]

    def _host_has_room(self, slot: _Slot) -> bool:
        return bool(slot.host) or available_host_bytes() > 1.25 * slot.footprint


def available_host_bytes() -> int:
    """Memory that this machine can still give, from /proc/meminfo; a large number where that is missing."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        log.debug("no /proc/meminfo; host memory taken as ample")
    return 1 << 50


def device_budget(device: torch.device, memory_mib: int) -> int | None:
    """Bytes for resident models: the setting, else 95 % of what the device has; None on a CPU without a setting."""
    if memory_mib:
        return memory_mib * 2**20
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * 0.95)
    return None


def free_cached(device: torch.device) -> None:
    """Collect, then hand cached blocks back; in this order, because what is not collected is not free."""
    gc.collect()
    empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Hand the allocator's cached blocks back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mib(n_bytes: int) -> str:
    mib = n_bytes / 2**20
    return f"{mib:.1f}" if mib < 10 else f"{mib:.0f}"
