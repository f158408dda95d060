"""Vectors of the bundled trace for the simulator: what each prompt says and what its picture shows.

Row for row, first the warm cache and then the trace: ``text`` and ``image``, unit vectors of `scenes-clip` as float16. The
pictures are those that `scenes-large` draws of each prompt, as if every request were a miss; a refined picture may score a
little otherwise. Run: `python -m ops.scenes.trace_vectors`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ops.scenes.loop import work_folder
from ops.scenes.trace import DATA, TRACE, WARM_CACHE

VECTORS = DATA / "trace-vectors.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=work_folder())
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    from ops.scenes.embed import embed_images, embed_texts
    from ops.scenes.export import LARGE
    from ops.scenes.generate import Job, draw_all

    warm = [json.loads(line) for line in (WARM_CACHE / "captions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in TRACE.read_text().splitlines()]
    jobs = [Job(LARGE, row["prompt"], row["seed"]) for row in rows]
    draw_all(jobs, arguments.work / "pictures", processes=arguments.processes, label="trace")
    pictures = [WARM_CACHE / row["file"] for row in warm] + [job.path(arguments.work / "pictures") for job in jobs]
    np.savez_compressed(
        VECTORS,
        text=embed_texts([row["prompt"] for row in warm + rows]).astype(np.float16),
        image=embed_images([Image.open(path) for path in pictures]).astype(np.float16),
    )
    print(f"{VECTORS}: {len(pictures)} rows, {VECTORS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
