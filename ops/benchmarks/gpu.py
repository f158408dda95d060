"""`make bench-gpu`: what the supported models cost on this GPU, without a download.

Full-size architectures with random weights: time and memory depend on shapes, not on weights (images are noise). For
each family: memory, seconds per step and per 50-step image at 1024x1024, what batches gain; then the price of swapping
two models, and the throughput of MoDM against the large model alone over one list of requests, really drawn.

Without a CUDA (or ROCm) device it says so and ends with 0. ``--tiny`` runs the same code at toy size on any machine.
The hits of the end-to-end part are an assumed plan, printed in the report: random weights cannot be searched.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

FAMILIES = ("sd3", "flux", "sdxl", "sana")
FULL_STEPS = 50
#: Guidance as each family runs by default: it decides whether a step evaluates the network once or twice.
GUIDANCE = {"sd3": 3.5, "flux": 3.5, "sdxl": 5.0, "sana": 4.5}
#: Assumed for the end-to-end part: 7 of 10 requests hit, k as below (the paper publishes no readable histogram).
PLAN = (0, 30, 15, 0, 25, 5, 30, 10, 0, 25)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How to run: on what, how large, how many steps are timed, and when to stop starting new parts."""

    device: str
    tiny: bool
    steps: int
    side_px: int
    deadline_s: float

    @property
    def dtype(self) -> Any:
        import torch

        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def time_left(self) -> float:
        return self.deadline_s - time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print and write the report. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ops.benchmarks.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="toy size, any machine: checks the benchmark itself")
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma list (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps timed per image (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no new part starts after this (default: 540)")
    parser.add_argument(
        "--out", type=Path, default=Path(".modm/reports/gpu.json"), help="report (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    families = tuple(name.strip() for name in args.families.split(",") if name.strip())
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"unknown families: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")

    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.tiny:
        print("no CUDA or ROCm device here: the GPU benchmark was skipped (--tiny checks it on any machine)")
        return 0
    if not has_gpu:
        torch.set_num_threads(1)  # toy layers on busy cores: more threads only wait for one another
    bench = Bench(
        device="cuda" if has_gpu else "cpu",
        tiny=args.tiny,
        steps=args.steps,
        side_px=64 if args.tiny else 1024,
        deadline_s=time.monotonic() + args.budget_s,
    )
    report = run(bench, families)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(as_text(report))
    print(f"report: {args.out}", file=sys.stderr)
    return 0


def run(bench: Bench, families: Sequence[str]) -> dict[str, Any]:
    """Every part that there is time and memory for; a part that fails is reported by its one line."""
    import torch

    is_cuda = bench.device == "cuda"
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU {platform.machine()}, no GPU",
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if is_cuda else None,
        "torch": torch.__version__,
        "scale": "tiny" if bench.tiny else "full",
        "side_px": bench.side_px,
        "steps_timed": bench.steps,
        "families": {},
    }
    for family in families:
        report["families"][family] = _part(bench, partial(family_costs, bench, family))
    if {"sd3", "sdxl"} <= set(families):
        report["swap"] = _part(bench, partial(swap_prices, bench, "sd3", "sdxl"))
    for small in ("sdxl", "sana"):
        if {"sd3", small} <= set(families):
            report[f"modm_sd3_{small}"] = _part(bench, partial(throughput, bench, "sd3", small))
    return report


def _part(bench: Bench, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if bench.time_left() <= 0:
        return {"skipped": "out of time"}
    try:
        return work()
    except RuntimeError as error:  # out of memory above all: the other parts may still fit
        return {"failed": str(error).splitlines()[0][:200]}
    finally:
        _free(bench)


@contextmanager
def _built(bench: Bench, family: str) -> Iterator[Any]:
    """The family as a pair of pipelines over one set of weights, on the device."""
    from workers.architectures import build
    from workers.catalogue import ModelEntry
    from workers.pipelines import Pair, image_pipeline

    text = build(family, "tiny" if bench.tiny else "full", dtype=bench.dtype, device=bench.device)
    entry = ModelEntry(
        name=family, repo=family, size=f"{bench.side_px}x{bench.side_px}", guidance_scale=GUIDANCE[family]
    )
    pair = Pair(entry=entry, text=text, image=image_pipeline(entry, text))
    pair.image.set_progress_bar_config(disable=True)
    try:
        yield pair
    finally:
        del pair, text
        _free(bench)


def family_costs(bench: Bench, family: str) -> dict[str, Any]:
    """Weights, peak memory, seconds per step and image, a refinement, and batches of 2 and 4."""
    from workers.residency import weight_bytes

    began = time.perf_counter()
    with _built(bench, family) as pair:
        out: dict[str, Any] = {
            "build_s": round(time.perf_counter() - began, 1),
            "weights_gib": round(weight_bytes(pair) / 2**30, 2),
        }
        _draw(bench, pair, steps=2)  # warm-up: kernels are chosen and memory is taken
        _reset_peak(bench)
        step_s, rest_s, image = _draw(bench, pair, steps=bench.steps)
        out |= {
            "s_per_step": round(step_s, 4),
            "s_outside_steps": round(rest_s, 3),
            "s_per_50_step_image": round(rest_s + FULL_STEPS * step_s, 2),
            "peak_gib": _peak_gib(bench),
        }
        hit_step_s, hit_rest_s, _ = _draw(bench, pair, steps=bench.steps, source=image, start=bench.steps // 2)
        out["refine_s_per_step"] = round(hit_step_s, 4)
        out["refine_s_outside_steps"] = round(hit_rest_s, 3)
        for batch in (2, 4):
            if bench.time_left() < 30 + 10 * step_s * bench.steps:
                break
            out[f"batch_{batch}"] = _batch_gain(bench, pair, batch, step_s)
    return out


def _batch_gain(bench: Bench, pair: Any, batch: int, single_step_s: float) -> dict[str, Any]:
    import torch

    try:
        _reset_peak(bench)
        step_s, _, _ = _draw(bench, pair, steps=max(3, bench.steps // 2), num_images_per_prompt=batch)
    except torch.OutOfMemoryError:
        _free(bench)
        return {"failed": "out of memory"}
    gain = single_step_s * batch / step_s
    return {"s_per_step": round(step_s, 4), "gain": round(gain, 3), "peak_gib": _peak_gib(bench)}


def _draw(
    bench: Bench, pair: Any, *, steps: int, source: Any = None, start: int = 0, **extra: Any
) -> tuple[float, float, Any]:
    """(seconds per step, seconds outside the steps, image). The first step is left out of the mean."""
    from workers.pipelines import call_arguments, exact_strength, quiet

    pipeline = pair.text if source is None else pair.image
    arguments = call_arguments(pair, pipeline, prompt="a red fox", negative_prompt="", guidance_scale=None, seed=0)
    arguments |= {"width": bench.side_px, "height": bench.side_px, "num_inference_steps": steps} | extra
    if source is not None:
        arguments |= {"image": source, "strength": exact_strength(pipeline, start, steps)}
        arguments = {k: v for k, v in arguments.items() if k not in {"width", "height"} or pair.entry.name != "sdxl"}
    stamps: list[float] = []

    def at_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        _synchronise(bench)
        stamps.append(time.perf_counter())
        return kwargs

    began = time.perf_counter()
    with quiet():
        image = pipeline(callback_on_step_end=at_step, **arguments).images[0]
    _synchronise(bench)
    whole_s = time.perf_counter() - began
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    step_s = sum(gaps) / len(gaps) if gaps else whole_s
    return step_s, max(0.0, whole_s - step_s * len(stamps)), image


def swap_prices(bench: Bench, large: str, small: str) -> dict[str, Any]:
    """Seconds to bring each of two models to the device when only one of them may be there, by `workers.residency`."""
    import torch

    from workers.residency import Residency, weight_bytes

    with _built(bench, large) as first, _built(bench, small) as second:
        sizes = {large: weight_bytes(first), small: weight_bytes(second)}
        residency = Residency(torch.device(bench.device), max(sizes.values()) + 1, parking="host")
        for name, pair in ((large, first), (small, second)):
            residency.add(name, partial(_same, pair))
        residency.ensure(large)
        park_began = time.perf_counter()
        residency.ensure(small)
        first_park_s = time.perf_counter() - park_began
        times: dict[str, list[float]] = {large: [], small: []}
        for _ in range(3):
            for name in (large, small):
                times[name].append(residency.ensure(name)[1])
    best = {name: min(values) for name, values in times.items()}
    return {
        "first_park_and_change_s": round(first_park_s, 3),
        "to_device_s": {name: round(value, 4) for name, value in best.items()},
        "gib_per_s": {name: round(sizes[name] / 2**30 / value, 2) for name, value in best.items()},
    }


def _same(pair: Any) -> Any:
    return pair


def throughput(bench: Bench, large: str, small: str) -> dict[str, Any]:
    """The plan's requests on one device with both models resident, against the same number of large images."""
    requests = PLAN if bench.time_left() > 240 or bench.tiny else PLAN[:5]
    steps = bench.steps if bench.tiny else FULL_STEPS
    with _built(bench, large) as first, _built(bench, small) as second:
        _draw(bench, first, steps=2)
        _, _, image = _draw(bench, second, steps=2)
        _draw(bench, second, steps=4, source=image, start=2)
        began = time.perf_counter()
        _draw(bench, first, steps=steps)
        large_s = time.perf_counter() - began
        began = time.perf_counter()
        for k in requests:
            if k == 0:
                _draw(bench, first, steps=steps)
            else:
                _draw(bench, second, steps=steps, source=image, start=min(k * steps // FULL_STEPS, steps - 1))
        modm_s = time.perf_counter() - began
    return {
        "plan_skipped_steps": list(requests),
        "large_only_s": round(large_s * len(requests), 2),
        "modm_s": round(modm_s, 2),
        "speedup": round(large_s * len(requests) / modm_s, 3),
        "note": "hits are an assumed plan; large-only is one measured image times the number of requests",
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as a short Markdown table and lines."""
    lines = [
        f"GPU benchmark: {report['device']}, {report['side_px']} px, {report['scale']} size, torch {report['torch']}",
        "",
        "| family | weights GiB | peak GiB | s/step | s/50-step image | batch 2 | batch 4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["families"].items():
        if "s_per_step" not in row:
            lines.append(f"| {name} | {row.get('failed') or row.get('skipped')} | | | | | |")
            continue
        gains = [f"{g['gain']:.2f}x" if (g := row.get(f"batch_{b}", {})).get("gain") else "-" for b in (2, 4)]
        lines.append(
            f"| {name} | {row['weights_gib']} | {row['peak_gib']} | {row['s_per_step']} |"
            f" {row['s_per_50_step_image']} | {' | '.join(gains)} |"
        )
    lines += [f"{key}: {json.dumps(value)}" for key, value in report.items() if key.startswith(("swap", "modm_"))]
    return "\n".join(lines)


def _synchronise(bench: Bench) -> None:
    if bench.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _reset_peak(bench: Bench) -> None:
    if bench.device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_gib(bench: Bench) -> float | None:
    if bench.device != "cuda":
        return None
    import torch

    return float(round(torch.cuda.max_memory_allocated() / 2**30, 2))


def _free(bench: Bench) -> None:
    if bench.device == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
