"""Device profiles: seconds per image of a model on a device, in TOML, each with its source."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from modm_tasks.errors import InvalidInputError, NotFoundError

FOLDER = Path(__file__).parent.parent / "profiles"


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """``image_s``: seconds of one full image; None = not measured."""

    image_s: float | None
    source: str
    inferred: bool = False


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    name: str
    device: str
    models: dict[str, ModelProfile]

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
    """A bundled profile by name, or a TOML file by path. Raises NotFoundError, InvalidInputError."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        bundled = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise NotFoundError(f"no profile {name!r}; bundled are {bundled}, or give a .toml file", field="profile")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        models = {
            str(model): ModelProfile(
                image_s=None if row.get("image_s") is None else float(row["image_s"]),
                source=str(row.get("source", "")),
                inferred=bool(row.get("inferred", False)),
            )
            for model, row in data["models"].items()
        }
    except (tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InvalidInputError(f"profile {path.name}: {error}", field="profile") from error
    for model, row in models.items():
        if row.image_s is not None and row.image_s <= 0:
            raise InvalidInputError(f"profile {path.name}: image_s of {model} must be above 0", field="image_s")
    return DeviceProfile(name=path.stem, device=str(data.get("device", "")), models=models)
