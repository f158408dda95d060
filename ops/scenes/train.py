"""Trains and ships the whole `scenes` family: `python -m ops.scenes.train` (`make train-scenes`).

All stages run in order, each resumes from its checkpoint, and a finished one costs seconds, so the command is simply
repeated after any interruption. On two slow CPU cores it takes about two hours with `--only` used to run two stages
side by side (all stages after the VAE and the text encoders are independent until the export), and some four hours
alone; see STAGES for the order. One thread is used: at this size two one-thread processes beat one two-thread process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ops.scenes.classifier import export_classifier, train_classifier
from ops.scenes.clip import train_clip
from ops.scenes.denoisers import start_from_shipped, train_large, train_small
from ops.scenes.export import DIFFUSION_FOLDER, LARGE, SMALL, export_clip, export_diffusion
from ops.scenes.holdout import write_eval_prompts
from ops.scenes.loop import work_folder
from ops.scenes.text import train_text
from ops.scenes.vae import train_vae

#: glibc gives big blocks back to the kernel after every step by default and faults them in again; keeping them makes
#: convolution training two to three times as fast.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "OMP_NUM_THREADS": "1"}


def _classifier(checkpoints: Path) -> None:
    train_classifier(checkpoints)
    export_classifier(checkpoints)


def _clip(checkpoints: Path) -> None:
    train_clip(checkpoints)
    export_clip(checkpoints)


def _large(checkpoints: Path) -> None:
    train_large(checkpoints)
    export_diffusion(checkpoints, LARGE)


def _small(checkpoints: Path) -> None:
    train_small(checkpoints)
    export_diffusion(checkpoints, SMALL)


def _module(name: str) -> Callable[[Path], None]:
    def run(checkpoints: Path) -> None:
        command = [sys.executable, "-m", name, "--work", str(checkpoints.parent)]
        subprocess.run(command, check=True)

    return run


#: In order. The last five need the shipped weights of all three models.
STAGES: dict[str, Callable[[Path], None]] = {
    "vae": train_vae,
    "text": train_text,
    "classifier": _classifier,
    "clip": _clip,
    "small": _small,
    "large": _large,
    "prompts": lambda _: write_eval_prompts(),
    "calibrate": _module("ops.scenes.calibrate"),
    "floors": _module("ops.calibration.scenes_floors"),
    "trace": _module("ops.scenes.trace"),
    "evaluate": _module("ops.scenes.evaluate"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=work_folder(), help="checkpoints and pictures (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument(
        "--from-shipped",
        action="store_true",
        help="train a denoiser again on the VAE and text encoders that are shipped (with --only small or large)",
    )
    arguments = parser.parse_args()
    if arguments.from_shipped and {"vae", "text"} & set(arguments.only):
        parser.error("--from-shipped starts from the shipped vae and text: name other stages with --only")
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        # The allocator reads its settings once, at start.
        command = [sys.executable, "-m", "ops.scenes.train", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ALLOCATOR})
    torch.set_num_threads(1)
    checkpoints = arguments.work / "ckpt"
    if arguments.from_shipped:
        start_from_shipped(DIFFUSION_FOLDER / LARGE, checkpoints)
    for name in STAGES:
        if name in arguments.only:
            print(f"== {name}", file=sys.stderr, flush=True)
            STAGES[name](checkpoints)


if __name__ == "__main__":
    main()
