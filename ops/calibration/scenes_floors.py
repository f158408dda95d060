"""Adds the floors of verified hits to the shipped ladder of `scenes`: `python -m ops.calibration.scenes_floors`.

To be run after `python -m ops.scenes.calibrate`, whose prompts and pictures it uses. Each rung is judged by the pairs that
fall on it; an image has failed where the classifier finds any attribute wrong. Chains of even number fit, the others are
held out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ops.calibration.floors import Refined, fit_floors
from ops.scenes.calibrate import LADDER, chain_similarity, read_ladder
from ops.scenes.classifier import attribute_accuracy
from ops.scenes.embed import embed_images, embed_texts
from ops.scenes.export import LARGE, SMALL
from ops.scenes.generate import Job, draw_all
from ops.scenes.holdout import CHAIN_LENGTH, calibration_prompts
from ops.scenes.loop import work_folder
from orchestrator.decisions.fitting import FittedRung, on_rung, rungs_json

#: Pairs refined for each rung.
PAIRS = 320


def measure(rungs: list[FittedRung], work: Path, processes: int) -> dict[int, Refined]:
    """Refined images by k, scored and judged. ``rungs`` in descending similarity."""
    prompts, folder = calibration_prompts(), work / "pictures"
    jobs = [Job(LARGE, p.text, p.seed) for p in prompts]
    images = draw_all(jobs, folder, processes=processes, label="floors large")
    large_failed = attribute_accuracy(images, [p.scene for p in prompts])["mean"] < 1
    texts = embed_texts([p.text for p in prompts])
    similarity = chain_similarity(prompts, texts, embed_images(images))
    rng = np.random.default_rng(5)
    out = {}
    for index, rung in enumerate(rungs):
        pairs = np.argwhere(on_rung(similarity, rungs, index))
        if len(pairs) > PAIRS:
            pairs = pairs[np.sort(rng.choice(len(pairs), PAIRS, replace=False))]
        rows = pairs[:, 0]
        refine = [
            Job(SMALL, prompts[i].text, prompts[i].seed + 7,
                str(jobs[prompts[i].chain * CHAIN_LENGTH + member].path(folder)), rung.skipped_steps)
            for i, member in pairs
        ]  # fmt: skip
        refined = draw_all(refine, folder, processes=processes, label=f"floors k={rung.skipped_steps}")
        out[rung.skipped_steps] = Refined(
            scores=(texts[rows] * embed_images(refined)).sum(1),
            failed=attribute_accuracy(refined, [prompts[i].scene for i in rows])["mean"] < 1,
            large_failed=large_failed[rows],
            held_out=np.array([prompts[i].chain % 2 == 1 for i in rows]),
        )
    return out


def main() -> None:
    """Write ``verify_floor`` of each rung and ``verification`` into the ladder file; print the latter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=work_folder())
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ladder", type=Path, default=LADDER, help="the file that is read and written")
    given = parser.parse_args()
    rungs = [FittedRung(r.min_similarity, r.skipped_steps, r.quality, r.pairs) for r in read_ladder(given.ladder)]
    floors, verification = fit_floors(measure(rungs, given.work, given.processes))
    ladder = json.loads(given.ladder.read_text())
    ladder["rungs"] = rungs_json(rungs, floors)
    ladder["hold_out"]["verification"] = verification
    given.ladder.write_text(json.dumps(ladder, indent=2) + "\n")
    print(json.dumps(verification, indent=2))


if __name__ == "__main__":
    main()
