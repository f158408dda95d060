"""What the users ask for. Pure: the same seed gives the same requests, and every mechanism has its occasions among them.

In turns of six: a seeded prompt that comes again and again (exact repeats); a new prompt that takes only a near image, so
that it is drawn large; paraphrases of it, which in even turns take only a near image too and so wait on it and on one
another, and in odd turns are hits at once, whose images turn the queued first one into a hit; a prompt without a seed
that comes again and again (variations); one in a hurry.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

#: So many prompts of each kind come in turn.
REPEATED = 5
#: Requests of a turn.
TURN = 6
#: Deadlines: one that allows a second drawing under any fault, and one that lets its request pass others.
PATIENT_S, HURRIED_S = 600.0, 30.0
_PREFIX = "an image of "


def paraphrase(prompt: str) -> str:
    """The same scene in other words."""
    return prompt.removeprefix(_PREFIX) if prompt.startswith(_PREFIX) else _PREFIX + prompt


def body(
    number: int, prompts: Sequence[str], *, seed: int, picky: float | None = None, steps: int | None = None
) -> dict[str, Any]:
    """The ``number``-th submit. ``picky``: the similarity below which the choosy ones take no image.

    ``steps``: of all but the seeded ones, which have all steps, or their repeats would not be exact.
    """
    turn, kind = divmod(number, TURN)
    choosy = {} if picky is None else {"min_similarity": picky}
    common: dict[str, Any] = {"deadline_s": PATIENT_S}
    if kind == 0:
        prompt = prompts[turn % REPEATED]
        return common | choosy | {"prompt": prompt, "seed": random.Random(f"{seed}:{prompt}").randrange(2**31)}
    if steps is not None:
        common["num_inference_steps"] = steps
    fresh = prompts[(2 * REPEATED + turn) % len(prompts)]
    if kind == 1:
        return common | choosy | {"prompt": fresh}
    if kind in (2, 3):
        return common | (choosy if turn % 2 == 0 else {}) | {"prompt": paraphrase(fresh)}
    if kind == 4:
        return common | {"prompt": prompts[REPEATED + turn % REPEATED]}
    return common | {"prompt": prompts[-1 - turn % len(prompts)], "deadline_s": HURRIED_S}
