"""The bundled trace and its warm cache: simulated users who refine prompts in sessions.

Written after what was measured on DiffusionDB: 13 % of prompts are exact repeats, the best cosine to any earlier prompt
is >= 0.9 for 43 % and >= 0.8 for 56 %, and the nearest such prompt is a median of 8 requests back (10th percentile 2,
90th 290). One stream is drawn; its first part are the users' earlier sessions, whose pictures (by `scenes-large`) make
the warm cache, and the rest is the trace. Run: `python -m ops.scenes.trace`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ops.scenes.captions import caption
from ops.scenes.loop import work_folder
from ops.scenes.scene import Scene, edit_scene, sample_scene

DATA = Path(__file__).parent / "data"
TRACE, WARM_CACHE = DATA / "trace.jsonl", DATA / "warm-cache"
WARM, REQUESTS = 200, 400
#: What a user does next: say exactly the same again, say the same in other words, change one attribute, change
#: several, or turn to another subject.
ACTIONS = ("repeat", "reword", "edit", "rework", "new")
SHARES = (0.115, 0.25, 0.09, 0.375, 0.17)
#: Requests a minute, in the trace's recorded arrivals.
RATE_PER_MIN = 60.0


@dataclass(frozen=True)
class Request:
    """One row of the trace; `scene` is for making and judging it and is not written."""

    prompt: str
    scene: Scene
    arrival_s: float
    seed: int
    client: str

    def row(self) -> dict[str, object]:
        return {
            "prompt": self.prompt,
            "arrival_s": round(self.arrival_s, 3),
            "seed": self.seed,
            "client": self.client,
        }


def stream(seed: int = 7, count: int = WARM + REQUESTS) -> list[Request]:
    """Requests of all users in order of arrival."""
    rng = np.random.default_rng(seed)
    out: list[Request] = []
    now, clients = 0.0, 0
    for index in range(count):
        now += float(rng.exponential(60.0 / RATE_PER_MIN))
        action = "new" if index < 8 else str(rng.choice(ACTIONS, p=SHARES))
        if action == "new":
            scene = sample_scene(rng)
            text = caption(scene, rng)
            # Half of the new subjects come from users who were here before.
            if clients == 0 or rng.random() < 0.5:
                clients += 1
                client = f"user-{clients:03d}"
            else:
                client = f"user-{int(rng.integers(clients)) + 1:03d}"
        else:
            before = out[index - _lag(rng, index)]
            client = before.client
            scene, text = _refined(before, action, rng)
        out.append(Request(text, scene, now, int(rng.integers(2**31)), client))
    return out


def _lag(rng: np.random.Generator, index: int) -> int:
    """How many requests back the prompt is that a user goes on from: a recent one of a few, or an old favourite."""
    recent = 1 + rng.lognormal(np.log(3.5), 0.9)
    old = np.exp(rng.uniform(np.log(30), np.log(500)))
    lag = recent if rng.random() < 0.82 else old
    return int(np.clip(lag, 1, index))


def _refined(before: Request, action: str, rng: np.random.Generator) -> tuple[Scene, str]:
    if action == "repeat":
        return before.scene, before.prompt
    scene = before.scene
    for _ in range({"reword": 0, "edit": 1, "rework": int(rng.integers(2, 4))}[action]):
        edited = edit_scene(scene, rng)
        while edited.held_out:
            edited = edit_scene(scene, rng)
        scene = edited
    return scene, caption(scene, rng)


def statistics(prompts: Sequence[str], vectors: np.ndarray, start: int) -> dict[str, float]:
    """The DiffusionDB measurements, for the prompts from `start` on; earlier ones count as history."""
    repeats, best, lags = [], [], []
    for i in range(start, len(prompts)):
        repeats.append(prompts[i] in prompts[:i])
        cosine = vectors[:i] @ vectors[i]
        # The latest of equally near prompts is the nearest one.
        nearest = int(np.flatnonzero(cosine >= cosine.max() - 1e-5)[-1])
        best.append(float(cosine.max()))
        if cosine.max() >= 0.8:
            lags.append(i - nearest)
    near = np.array(best)
    return {
        "exact_repeats": float(np.mean(repeats)),
        "cosine_0.9": float((near >= 0.9).mean()),
        "cosine_0.8": float((near >= 0.8).mean()),
        "lag_p10": float(np.percentile(lags, 10)),
        "lag_p50": float(np.median(lags)),
        "lag_p90": float(np.percentile(lags, 90)),
    }


def write_trace(requests: Sequence[Request], path: Path = TRACE) -> None:
    first = requests[0].arrival_s
    rows = [{**r.row(), "arrival_s": round(r.arrival_s - first, 3)} for r in requests]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_warm_cache(requests: Sequence[Request], work: Path, processes: int, folder: Path = WARM_CACHE) -> None:
    """Pictures by `scenes-large` of the earlier sessions, and `captions.jsonl` beside them."""
    from ops.scenes.export import LARGE
    from ops.scenes.generate import Job, draw_all

    jobs = [Job(LARGE, r.prompt, r.seed) for r in requests]
    draw_all(jobs, work / "pictures", processes=processes, label="warm cache")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for number, (request, job) in enumerate(zip(requests, jobs, strict=True)):
        name = f"{number:04d}.png"
        shutil.copyfile(job.path(work / "pictures"), folder / name)
        rows.append({"file": name, "prompt": request.prompt, "seed": request.seed, "model": LARGE})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=work_folder())
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--trace-only", action="store_true", help="leave the warm cache as it is")
    arguments = parser.parse_args()
    from ops.scenes.embed import embed_texts

    requests = stream()
    prompts = [r.prompt for r in requests]
    print(json.dumps(statistics(prompts, embed_texts(prompts), WARM), indent=2))
    write_trace(requests[WARM:])
    if not arguments.trace_only:
        write_warm_cache(requests[:WARM], arguments.work, arguments.processes)


if __name__ == "__main__":
    main()
