"""Prompts that training never saw, in chains of one-attribute edits as users make them.

Every scene of a chain is a prompt to judge, and every picture of a chain is a possible cached source for its other
prompts: one drawing of the chains by the large model gives both, at similarities from "the same" to "four edits away".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ops.scenes.captions import caption, parse_caption
from ops.scenes.denoisers import BANK_SIZE
from ops.scenes.scene import Scene, edit_scene, sample_scene

DATA = Path(__file__).parent / "data"
EVAL_PROMPTS = DATA / "eval_prompts.jsonl"
CHAIN_LENGTH = 5
EVAL_CHAINS, CALIBRATION_CHAINS, HELD_OUT_COUNT = 100, 50, 60


@dataclass(frozen=True)
class Prompt:
    """`chain` numbers the chain; prompts of held-out combinations have chain -1."""

    text: str
    scene: Scene
    seed: int
    chain: int


@lru_cache(maxsize=1)
def trained_scenes(seed: int = 11) -> frozenset[Scene]:
    """Every scene of the diffusion models' training bank (`denoisers.load_bank` draws the same ones)."""
    rng = np.random.default_rng(seed)
    return frozenset(sample_scene(rng) for _ in range(BANK_SIZE))


def chains(seed: int, count: int, length: int = CHAIN_LENGTH) -> list[Prompt]:
    """`count` chains of `length` prompts, scenes all different and none of them trained on."""
    rng = np.random.default_rng(seed)
    taken = set(trained_scenes())
    out: list[Prompt] = []
    while len(out) < count * length:
        scene = sample_scene(rng)
        members: list[Scene] = []
        tries = 0
        while len(members) < length and tries < 200:
            if scene not in taken and not scene.held_out:
                members.append(scene)
                taken.add(scene)
            elif not members:
                break
            scene = edit_scene(members[-1], rng)
            tries += 1
        if len(members) == length:
            number = len(out) // length
            out += [
                Prompt(caption(s, rng), s, seed * 100_000 + number * length + i, number) for i, s in enumerate(members)
            ]
    return out


def held_out_prompts(seed: int = 303, count: int = HELD_OUT_COUNT) -> list[Prompt]:
    """Prompts whose scene holds a combination (such as a purple star) that training never showed."""
    rng = np.random.default_rng(seed)
    out: list[Prompt] = []
    while len(out) < count:
        scene = sample_scene(rng, allow_held_out=True)
        if scene.held_out:
            out.append(Prompt(caption(scene, rng), scene, seed * 100_000 + len(out), -1))
    return out


def calibration_prompts() -> list[Prompt]:
    return chains(202, CALIBRATION_CHAINS)


def write_eval_prompts(path: Path = EVAL_PROMPTS) -> None:
    prompts = chains(101, EVAL_CHAINS) + held_out_prompts()
    lines = [json.dumps({"prompt": p.text, "seed": p.seed, "chain": p.chain}) for p in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read_eval_prompts(path: Path = EVAL_PROMPTS) -> list[Prompt]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Prompt(r["prompt"], parse_caption(r["prompt"]), r["seed"], r["chain"]) for r in rows]


if __name__ == "__main__":
    write_eval_prompts()
