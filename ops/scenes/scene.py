"""What a scene is: one or two coloured shapes on a background, and how scenes are drawn at random.

A scene is six kinds of attribute (``ATTRIBUTES``). Its objects are kept in *reading order* (left before right, top
before bottom), so that "slot 0" means the same thing for the renderer, the captions and the classifier. Pixel jitter
is no part of a scene: two pictures of one scene differ by the renderer's seed only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "white", "pink", "brown", "cyan")
TEXTURES = ("plain", "gradient", "striped", "checkered")
POSITIONS = ("centre", "left", "right", "top", "bottom")
PAIR_LAYOUTS = ("left-right", "top-bottom")
LAYOUTS = POSITIONS + PAIR_LAYOUTS

#: Attribute kinds that are judged; shape, colour and size exist once per object.
ATTRIBUTES = ("background", "texture", "layout", "shape", "colour", "size")

#: Never shown to the CLIP or the diffusion models: (shape, colour) of any object, and (background, texture).
HELD_OUT_OBJECTS = frozenset({("star", "purple"), ("triangle", "orange")})
HELD_OUT_BACKGROUNDS = frozenset({("pink", "checkered")})

#: Columns of `Scene.codes`, and how many values each has; slot-1 columns of a one-object scene hold -1.
CODE_COLUMNS = ("background", "texture", "layout", "shape0", "colour0", "size0", "shape1", "colour1", "size1")
CODE_SIZES = (
    len(BACKGROUNDS),
    len(TEXTURES),
    len(LAYOUTS),
    *(len(SHAPES), len(COLOURS), len(SIZES)) * 2,
)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape; `size` is a name of `SIZES`, not pixels."""

    shape: str
    colour: str
    size: str

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS or self.size not in SIZES:
            raise ValueError(f"no such object: {self.size} {self.colour} {self.shape}")


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two objects (reading order), a layout that fits their number, and a background."""

    objects: tuple[SceneObject, ...]
    layout: str
    background: str
    texture: str

    def __post_init__(self) -> None:
        allowed = {1: POSITIONS, 2: PAIR_LAYOUTS}.get(len(self.objects), ())
        if self.layout not in allowed:
            raise ValueError(f"layout {self.layout!r} does not fit {len(self.objects)} objects")
        if self.background not in BACKGROUNDS or self.texture not in TEXTURES:
            raise ValueError(f"no such background: {self.texture} {self.background}")
        if len(self.objects) == 2 and self.objects[0].colour == self.objects[1].colour:
            # Two colours always differ, so that "which colour belongs to which shape" has one answer.
            raise ValueError("the two objects of a scene have different colours")

    @property
    def held_out(self) -> bool:
        """Whether the scene holds a combination that training never shows."""
        pairs = {(o.shape, o.colour) for o in self.objects}
        return bool(pairs & HELD_OUT_OBJECTS) or (self.background, self.texture) in HELD_OUT_BACKGROUNDS

    def codes(self) -> tuple[int, ...]:
        """Integer codes in the order of `CODE_COLUMNS`; -1 where a one-object scene has no second object."""
        out = [BACKGROUNDS.index(self.background), TEXTURES.index(self.texture), LAYOUTS.index(self.layout)]
        for o in self.objects:
            out += [SHAPES.index(o.shape), COLOURS.index(o.colour), SIZES.index(o.size)]
        return tuple(out + [-1] * (len(CODE_COLUMNS) - len(out)))


def scene_from_codes(codes: tuple[int, ...] | np.ndarray) -> Scene:
    """The inverse of `Scene.codes`."""
    c = [int(v) for v in codes]
    slots = [c[3:6]] + ([c[6:9]] if c[6] >= 0 else [])
    objects = tuple(SceneObject(SHAPES[s], COLOURS[k], SIZES[z]) for s, k, z in slots)
    return Scene(objects, LAYOUTS[c[2]], BACKGROUNDS[c[0]], TEXTURES[c[1]])


def sample_scene(rng: np.random.Generator, *, allow_held_out: bool = False, pair_fraction: float = 0.65) -> Scene:
    """One random scene; held-out combinations are rejected unless asked for (rejection keeps the rest uniform)."""
    while True:
        count = 2 if rng.random() < pair_fraction else 1
        colours = rng.permutation(len(COLOURS))[:count]
        objects = tuple(
            SceneObject(SHAPES[rng.integers(len(SHAPES))], COLOURS[c], SIZES[rng.integers(len(SIZES))]) for c in colours
        )
        layouts = PAIR_LAYOUTS if count == 2 else POSITIONS
        scene = Scene(
            objects,
            layouts[rng.integers(len(layouts))],
            BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
            TEXTURES[rng.integers(len(TEXTURES))],
        )
        if allow_held_out or not scene.held_out:
            return scene


def sample_scenes(
    seed: int, count: int, *, allow_held_out: bool = False, exclude: frozenset[Scene] = frozenset()
) -> list[Scene]:
    """`count` different scenes, none of them in `exclude`; the same seed gives the same list."""
    rng = np.random.default_rng(seed)
    seen: dict[Scene, None] = {}
    while len(seen) < count:
        scene = sample_scene(rng, allow_held_out=allow_held_out)
        if scene not in exclude:
            seen.setdefault(scene)
    return list(seen)


def swap_colours(scene: Scene) -> Scene:
    """The two objects exchange colours (a scene of one object comes back unchanged)."""
    if len(scene.objects) == 1:
        return scene
    a, b = scene.objects
    return replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


def swap_positions(scene: Scene) -> Scene:
    """The two objects exchange places; one object moves to the opposite side (the centre stays)."""
    if len(scene.objects) == 2:
        return replace(scene, objects=scene.objects[::-1])
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "centre": "centre"}
    return replace(scene, layout=opposite[scene.layout])


def edit_scene(scene: Scene, rng: np.random.Generator, *, attribute: str | None = None) -> Scene:
    """The same scene with one attribute changed, as a user who refines a prompt would; `attribute` picks the kind.

    The number of objects never changes: that would be another picture, not a refinement.
    """
    while True:
        kind = attribute or ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
        if kind == "background":
            return replace(scene, background=_other(rng, BACKGROUNDS, (scene.background,)))
        if kind == "texture":
            return replace(scene, texture=_other(rng, TEXTURES, (scene.texture,)))
        if kind == "layout":
            layouts = PAIR_LAYOUTS if len(scene.objects) == 2 else POSITIONS
            return replace(scene, layout=_other(rng, layouts, (scene.layout,)))
        slot = int(rng.integers(len(scene.objects)))
        old = scene.objects[slot]
        if kind == "shape":
            new = replace(old, shape=_other(rng, SHAPES, (old.shape,)))
        elif kind == "size":
            new = replace(old, size=_other(rng, SIZES, (old.size,)))
        elif kind == "colour":
            new = replace(old, colour=_other(rng, COLOURS, tuple(o.colour for o in scene.objects)))
        else:
            raise ValueError(f"no such attribute: {kind}")
        objects = tuple(new if i == slot else o for i, o in enumerate(scene.objects))
        return replace(scene, objects=objects)


def _other(rng: np.random.Generator, values: tuple[str, ...], taken: tuple[str, ...]) -> str:
    rest = [v for v in values if v not in taken]
    return rest[int(rng.integers(len(rest)))]
