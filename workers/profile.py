"""What an image costs on this machine: ``python -m workers.profile``, started by `modm profile`, prints it as JSON.

As many processes as there are workers, each pinned like one, draw at the same time, because two workers on one machine slow
each other down (on a CPU above all). Each model draws whole images and refines images from the middle of the schedule; two
lengths give seconds per step and what an image costs beside its steps. The first draws of each are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from modm_tasks.errors import EngineError, InvalidInputError
from modm_tasks.settings import Settings, load_settings

#: The fewest counted draws of each kind.
LEAST = 5
PROMPT = "a large red circle on the left of a plain blue background"


def draws(settings: Settings, *, images: int) -> dict[str, Any]:
    """This process's draws: ``{"device": ..., "steps": T, "models": {name: {"full_s", "half_s"}}, "store_s": [...]}``.

    ``store_s``: embedding an image and writing its PNG, which a worker does before it takes the next one.
    """
    from modm_tasks.image_store import ImageStore
    from vector_store.embedder import load_embedder
    from workers.device import device_name
    from workers.engine import GenerateParams, RefineParams
    from workers.pinning import served_models
    from workers.runtime import make_engine

    engine, models = make_engine(settings), served_models(settings)
    engine.load(models)
    embedder = load_embedder(settings.embedder, "cpu" if engine.device == "fake" else engine.device)
    _say("ready")
    sys.stdin.readline()
    steps = settings.num_inference_steps
    device = settings.worker.device_name or device_name(engine.device)
    out: dict[str, Any] = {"device": device, "steps": steps, "models": {}, "store_s": []}
    with tempfile.TemporaryDirectory() as folder:
        store = ImageStore(folder)
        for model in models:
            full, half = [], []
            for i in range(images + 1):
                drawn = engine.generate(GenerateParams(model=model, prompt=PROMPT, seed=i, num_inference_steps=steps))
                refined = engine.refine(
                    RefineParams(
                        model=model, prompt=PROMPT, seed=i, num_inference_steps=steps, source=drawn.image,
                        skipped_steps=steps // 2, total_steps=steps,
                    )
                )  # fmt: skip
                began = time.perf_counter()
                embedder.embed_images([refined.image])
                store.write(f"00000000-0000-4000-8000-{i:012d}", 1, refined.image)
                took_s = time.perf_counter() - began
                if i:  # the first one warms up: kernels are chosen, caches filled
                    full.append(drawn.gpu_s)
                    half.append((refined.gpu_s, refined.steps_run))
                    out["store_s"].append(took_s)
            out["models"][model] = {"full_s": full, "half_s": half}
    return out


def combine(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The processes' draws as one profile, medians over all. Raises EngineError where devices differ."""
    devices = {one["device"] for one in found}
    if len(devices) > 1:
        raise EngineError(
            f"the workers have different devices ({', '.join(sorted(devices))}): profile them by themselves"
        )
    steps = found[0]["steps"]
    models = {}
    for name in found[0]["models"]:
        image_s = median(s for one in found for s in one["models"][name]["full_s"])
        half_s = median(s for one in found for s, _ in one["models"][name]["half_s"])
        ran = median(n for one in found for _, n in one["models"][name]["half_s"])
        step_s = max(0.0, image_s - half_s) / max(1, steps - ran)
        models[name] = {
            "image_s": round(image_s, 4),
            "step_s": round(step_s or image_s / steps, 6),
            "draws": sum(len(one["models"][name]["full_s"]) for one in found),
        }
    return {
        "device": devices.pop(),
        "workers": len(found),
        "steps": steps,
        "overhead_s": round(median(s for one in found for s in one["store_s"]), 4),
        "models": models,
    }


def measure(*, workers: int, images: int) -> dict[str, Any]:
    """Draw in ``workers`` processes at once. Raises InvalidInputError, EngineError: a process failed."""
    if images < LEAST:
        raise InvalidInputError(
            f"images must be at least {LEAST}, not {images}: the result is a median", field="images"
        )
    command = [sys.executable, "-m", "workers.profile", "--images", str(images), "--share", str(workers), "--gpu"]
    running = [
        subprocess.Popen([*command, str(gpu)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for gpu in range(workers)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise EngineError(f"a profiling process ended with status {process.wait(30)}")
        found = []
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in running:
            text, _ = process.communicate()
            if process.returncode:
                raise EngineError(f"a profiling process ended with status {process.returncode}")
            found.append(json.loads(text))
        return combine(found)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """With ``--workers``, all of it; with ``--gpu``, one process of it, which waits for a line on its stdin."""
    from modm_tasks.output import handle_errors

    parser = argparse.ArgumentParser(prog="python -m workers.profile", description=__doc__)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--images", type=int, default=LEAST)
    parser.add_argument("--gpu", default="")
    parser.add_argument("--share", type=int, default=1)
    given = parser.parse_args(argv)

    @handle_errors
    def work() -> None:
        if given.workers:
            _say(json.dumps(measure(workers=given.workers, images=given.images)))
            return
        from workers.pinning import pinned, thread_count

        settings = load_settings()
        os.environ.update(pinned(given.gpu, os.environ, threads=thread_count(settings, share=given.share)))
        _say(json.dumps(draws(settings, images=given.images)))

    work()


if __name__ == "__main__":
    import typer

    try:
        main()
    except typer.Exit as done:
        sys.exit(done.exit_code)
