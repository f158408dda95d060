"""Do the gains of the mechanisms hold beyond the one file that they were designed on? `python -m ops.benchmarks.workloads`.

Simulated, 4 GPUs, 60 s and 11 s. The DiffusionDB prompts in their order, in random order, another stretch of them, and by
another embedder; simulated users of `scenes` with text-to-image vectors and the shipped ladder, where predictions err; and
the arrival times of a commercial service instead of Poisson ones. Prints markdown.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from modm_tasks.output import note
from orchestrator.decisions.ladder import Ladder, load_ladder, parse
from orchestrator.simulator.config import SimConfig
from orchestrator.simulator.engine import Simulation
from orchestrator.simulator.experiments import MECHANISMS, fluid_bound_per_min
from orchestrator.simulator.run import Load, arrival_times
from orchestrator.simulator.similarity import VectorSimilarities

TEXT_LADDER = parse(".95:30,.90:25,.85:15,.80:10,.75:5")
#: Rows of the `scenes` workload, of another seed than the bundled trace.
SCENES, SCENES_SEED = 3000, 99
RATE_PER_MIN = 10.0
OFFERED = (10.0, 20.0, 40.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """``arrivals``: seconds, or None for Poisson ones."""

    name: str
    source: VectorSimilarities
    ladder: Ladder
    arrivals: list[float] | None = None


def workloads(data: Path) -> Iterator[Workload]:
    """Those that can be made from the folder of shared data, and the bundled one."""
    text = np.load(data / "diffusiondb_minilm.npy").astype(np.float32)
    prompts = (data / "diffusiondb_prompts.txt").read_text(encoding="utf-8").splitlines()
    source = vectors(text, warm=1000)
    yield Workload(name="DiffusionDB, as in the issue", source=source, ladder=TEXT_LADDER)
    times = service_arrivals(data / "alibaba_gentd26_requests.csv", source.n - source.warm)
    yield Workload(name="DiffusionDB, arrivals of GenTD26", source=source, ladder=TEXT_LADDER, arrivals=times)
    shuffled = np.random.default_rng(0).permutation(text)
    yield Workload(name="DiffusionDB, shuffled", source=vectors(shuffled, warm=1000), ladder=TEXT_LADDER)
    yield Workload(name="DiffusionDB, rows 1,500 on", source=vectors(text[1500:], warm=500), ladder=TEXT_LADDER)
    yield Workload(name="DiffusionDB, hashed words", source=vectors(hashed(prompts), warm=1000), ladder=TEXT_LADDER)
    yield scenes()


def vectors(text: np.ndarray, *, warm: int) -> VectorSimilarities:
    return VectorSimilarities(text, warm=warm, threshold=TEXT_LADDER.threshold)


def hashed(prompts: Sequence[str]) -> np.ndarray:
    from vector_store.embedder import HashEmbedder

    return HashEmbedder().embed_texts(prompts)


def scenes() -> Workload:
    """Simulated users; a rendering of the scene stands for the large model's image of it."""
    from ops.scenes.embed import embed_images, embed_texts
    from ops.scenes.render import render
    from ops.scenes.trace import stream
    from vector_store.embedder import bundled_folder

    requests = stream(SCENES_SEED, SCENES)
    ladder = load_ladder(bundled_folder("scenes-clip") / "ladder.json")
    text = embed_texts([r.prompt for r in requests])
    images = np.concatenate(
        [
            embed_images([render(r.scene, seed=r.seed) for r in requests[start : start + 100]])
            for start in range(0, SCENES, 100)
        ]
    )
    source = VectorSimilarities(text, warm=0, threshold=ladder.threshold, image=images)
    return Workload(name="scenes, text to image, cold cache", source=source, ladder=ladder)


def service_arrivals(path: Path, count: int) -> list[float]:
    """Times of the first requests of the file, stretched so that RATE_PER_MIN arrive on average. Seconds from the first."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted(datetime.fromisoformat(row["gmt_create"]).timestamp() for row in csv.DictReader(file))
    times = np.array(rows[:count]) - rows[0]
    stretched: list[float] = (times * (count * 60.0 / RATE_PER_MIN / times[-1])).tolist()
    return stretched


def served(config: SimConfig, work: Workload, rate_per_min: float) -> dict[str, float]:
    """Figures of one run. 0 = everything at once."""
    load = Load(kind="poisson" if rate_per_min else "burst", rate_per_min=rate_per_min, seed=42)
    times = work.arrivals if rate_per_min and work.arrivals is not None else arrival_times(load, work.source)
    report = Simulation(config, work.source, times).run().report()
    late = report["slo"]["violations_2x"]
    return {
        "served": report["served_per_min"],
        "hits": report["hit_rate"],
        "late": late,
        "gave_up": report["gave_up_waiting"],
    }


def table(found: Sequence[Workload]) -> str:
    """A row for each workload and system."""
    lines = [
        "| workload | system | at once: hit rate | served /min | of the bound | 10 a minute: hit rate | served /min "
        "| over 2x SLO |",
        "|---|---|---|---|---|---|---|---|",
    ]
    falls = []
    for work in found:
        base = SimConfig(gpus=4, large_s=60.0, small_s=11.0, ladder=work.ladder, verify_share=0.05)
        everything = replace(base, policy="modm-plus", features=frozenset(MECHANISMS))
        systems = {
            "large-only": replace(base, policy="large-only"),
            "modm": base,
            "modm + inflight": replace(base, features=frozenset({"inflight"})),
            "modm-plus": everything,
        }
        bound = fluid_bound_per_min(base, work.source)
        for name, config in systems.items():
            note(f"{work.name}: {name}")
            burst, open_loop = served(config, work, 0.0), served(config, work, RATE_PER_MIN)
            lines.append(
                f"| {work.name} | {name} | {burst['hits']:.2f} | {burst['served']:.2f} | {burst['served'] / bound:.2f} "
                f"| {open_loop['hits']:.2f} | {open_loop['served']:.2f} | {open_loop['late']:.1%} |"
            )
        if work.arrivals is not None:  # its rate is its own
            continue
        by_rate = [served(everything, work, rate)["served"] for rate in OFFERED]
        fall = min(later / earlier for earlier, later in pairwise(by_rate))
        falls.append(f"{work.name}: {', '.join(f'{n:.2f}' for n in by_rate)} (least ratio {fall:.3f})")
    offered = ", ".join("at once" if not rate else f"{rate:g}" for rate in OFFERED)
    return "\n".join([*lines, "", f"`modm-plus` served a minute at {offered}:", "", *(f"- {line}" for line in falls)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    print(table(list(workloads(parser.parse_args().data))))


if __name__ == "__main__":
    main()
