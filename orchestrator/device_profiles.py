"""Device profiles: seconds per image of a model on a device, in TOML, each with its source."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modm_tasks.errors import InvalidInputError, NotFoundError
from modm_tasks.settings import load_settings

FOLDER = Path(__file__).parent / "profiles"
#: Name of this machine's own profile, and its file in MODM_HOME, which `modm profile --save` writes.
LOCAL, LOCAL_FILE = "local", "profile.toml"


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """``image_s``: seconds of one full image; None = not measured. ``step_s``: of one step, where that was told apart.

    ``spread``: equally likely values of a worker's time for an image over the median; empty = always the same.
    """

    image_s: float | None
    source: str
    step_s: float | None = None
    inferred: bool = False
    spread: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """``total_steps``: of a full image. ``overhead_s``: beside drawing, for every image, before a worker takes the next one.

    ``front_s``: from the arrival of a request until it stands in its queue, ``claim_s``: until an idle worker has it.
    ``gap_s``: from a worker's end until it has the next one that waits.
    ``alone_share``: drawing time while every other worker is idle, over that while all draw (they share a machine).
    """

    name: str
    device: str
    models: dict[str, ModelProfile]
    total_steps: int = 50
    overhead_s: float = 0.0
    front_s: float = 0.0
    claim_s: float = 0.0
    gap_s: float = 0.0
    alone_share: float = 1.0

    def fixed_s(self, model: str) -> float:
        """The part of ``image_s`` that is no step; 0 where nobody measured the steps by themselves."""
        step_s = self.models[model].step_s
        return 0.0 if step_s is None else max(0.0, self.image_s(model) - step_s * self.total_steps)

    def step_s(self) -> dict[str, float]:
        """Seconds per step of every measured model, all of an image's time spread over its steps."""
        return {name: row.image_s / self.total_steps for name, row in self.models.items() if row.image_s is not None}

    def image_s(self, model: str) -> float:
        """Raises InvalidInputError for a model that the profile lacks or that nobody has measured."""
        found = self.models.get(model)
        if found is None:
            raise InvalidInputError(
                f"profile {self.name} has no model {model!r}; it has {', '.join(sorted(self.models))}", field="profile"
            )
        if found.image_s is None:
            raise InvalidInputError(f"profile {self.name}: {model} is {found.source}", field="profile")
        return found.image_s


def load_profile(name: str) -> DeviceProfile:
    """A bundled profile by name, ``local``, or a TOML file by path. Raises NotFoundError, InvalidInputError."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if name == LOCAL:
        path = load_settings().home / LOCAL_FILE
    if not path.is_file():
        if name == LOCAL:
            raise NotFoundError("this machine has no profile yet; `modm profile --save` writes one", field="profile")
        bundled = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise NotFoundError(f"no profile {name!r}; bundled are {bundled}, or give a .toml file", field="profile")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        models = {
            str(model): ModelProfile(
                image_s=None if row.get("image_s") is None else float(row["image_s"]),
                source=str(row.get("source", "")),
                inferred=bool(row.get("inferred", False)),
                step_s=None if row.get("step_s") is None else float(row["step_s"]),
                spread=tuple(float(v) for v in row.get("spread", ())),
            )
            for model, row in data["models"].items()
        }
    except (tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InvalidInputError(f"profile {path.name}: {error}", field="profile") from error
    for model, row in models.items():
        if row.image_s is not None and row.image_s <= 0:
            raise InvalidInputError(f"profile {path.name}: image_s of {model} must be above 0", field="image_s")
    return DeviceProfile(
        name=path.stem,
        device=str(data.get("device", "")),
        models=models,
        total_steps=int(data.get("total_steps", 50)),
        overhead_s=float(data.get("overhead_s", 0.0)),
        **{name: float(data[name]) for name in ("front_s", "claim_s", "gap_s", "alone_share") if name in data},
    )


def as_toml(found: Mapping[str, Any]) -> str:
    """A measured profile in the form of the bundled ones: what `modm profile` and the validation measure."""
    lines = [f"# {found['how']}", f"device = {json.dumps(found['device'])}", f"total_steps = {found['steps']}"]
    lines += [
        f"{name} = {found[name]}"
        for name in ("overhead_s", "front_s", "claim_s", "gap_s", "alone_share")
        if name in found
    ]
    for model, row in found["models"].items():
        lines += ["", f"[models.{json.dumps(model)}]", f"image_s = {row['image_s']}", f"step_s = {row['step_s']}"]
        lines += [f"spread = {json.dumps(row['spread'])}"] if "spread" in row else []
        lines.append(f"source = {json.dumps('median of ' + str(row['draws']) + ' images on this machine')}")
    return "\n".join(lines) + "\n"
