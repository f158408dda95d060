"""The caption grammar: several natural phrasings of one scene, and the parser that reads them back.

Every phrasing names every attribute, so that each prompt has exactly one right answer and accuracy is well defined.
The longest caption is 22 words: with start and end marks it fits the family's 24 text tokens.
"""

from __future__ import annotations

import re

import numpy as np

from ops.scenes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, SceneObject

_SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
_PREFIXES = ("", "", "", "a picture of ", "a drawing of ", "an image of ")
_RELATIONS = {
    "left-right": (("left of", "to the left of"), ("right of", "to the right of")),
    "top-bottom": (("above", "over"), ("below", "under")),
}
_PLACES = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
_TEXTURE_WORDS = {
    "plain": ("a plain {c} background", "a {c} plain background"),
    "gradient": ("a {c} gradient background", "a {c} gradient"),
    "striped": ("a striped {c} background", "a background of {c} stripes"),
    "checkered": ("a checkered {c} background", "a background of {c} checks"),
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One phrasing of `scene`, drawn at random."""
    background = _pick(rng, _TEXTURE_WORDS[scene.texture]).format(c=scene.background)
    names = [f"a {_pick(rng, _SIZE_WORDS[o.size])} {o.colour} {o.shape}" for o in scene.objects]
    if len(names) == 2:
        forward = rng.random() < 0.6
        words = _RELATIONS[scene.layout][0 if forward else 1]
        first, second = names if forward else names[::-1]
        subject = f"{first} {_pick(rng, words)} {second}"
    else:
        subject = f"{names[0]} {_pick(rng, _PLACES[scene.layout])}"
    form = rng.integers(4)
    if form == 0:
        return f"{background} with {subject}"
    if form == 1:
        return f"{subject}, {background}"
    return f"{_pick(rng, _PREFIXES)}{subject} {'of' if len(names) == 1 and form == 2 else 'on'} {background}"


def captions(scene: Scene, seed: int, count: int) -> list[str]:
    """`count` phrasings (repeats possible), the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [caption(scene, rng) for _ in range(count)]


_OBJECT = re.compile(rf"\b(large|big|small|little) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_GROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b")
_INVERSE = re.compile(r"\b(right of|below|under) a (?:large|big|small|little)\b")
_VERTICAL = re.compile(r"\b(above|over|below|under)\b")
_PLACE = re.compile(r"\b(?:in|on|at|near) the (centre|middle|left|right|top|bottom)\b")
_TEXTURE = re.compile(r"\b(plain|gradient|strip|check)")
_TEXTURE_NAMES = {"plain": "plain", "gradient": "gradient", "strip": "striped", "check": "checkered"}


def parse_caption(text: str) -> Scene:
    """The scene that a caption of this grammar describes; ValueError where the text is not of the grammar."""
    found = _OBJECT.findall(text)
    ground, texture = _GROUND.search(text), _TEXTURE.search(text)
    if len(found) not in (1, 2) or ground is None or texture is None:
        raise ValueError(f"not a scenes caption: {text!r}")
    sizes = {word: name for name, words in _SIZE_WORDS.items() for word in words}
    objects = tuple(SceneObject(shape, colour, sizes[size]) for size, colour, shape in found)
    if len(objects) == 2:
        layout = "top-bottom" if _VERTICAL.search(text) else "left-right"
        if _INVERSE.search(text):
            objects = objects[::-1]
    else:
        place = _PLACE.search(text)
        if place is None:
            raise ValueError(f"not a scenes caption (no place): {text!r}")
        layout = {"middle": "centre"}.get(place[1], place[1])
    return Scene(objects, layout, ground[1], _TEXTURE_NAMES[texture[1]])


def vocabulary() -> list[str]:
    """Every word that the grammar can say, sorted; tokenizers are built from it."""
    parts: list[str] = [*SHAPES, *COLOURS, *BACKGROUNDS, *_PREFIXES, "with of on background ,"]
    for group in (_SIZE_WORDS, _PLACES, _TEXTURE_WORDS):
        parts += [word for words in group.values() for word in words]
    parts += [word for pair in _RELATIONS.values() for words in pair for word in words]
    return sorted({word for part in parts for word in part.replace("{c}", "").split()})


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]
