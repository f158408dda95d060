"""The model catalogue: what each name means, where its weights are and how it wants to be called. No torch.

Entries come from `models.toml` beside this module and then from the file named by ``models_file``, whose entries win.
"""

from __future__ import annotations

import json
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from modm_tasks.errors import ConfigError
from modm_tasks.messages import parse_size
from modm_tasks.settings import Settings

SHIPPED = Path(__file__).with_name("models.toml")
CARD = "modm.json"


class ModelEntry(BaseModel):
    """One model. Figures are the model's own, not those of another family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    repo: str = Field("", description="Hub repository.")
    folder: Path | None = Field(None, description="Local folder that from_pretrained loads.")
    revision: str | None = None
    variant: str | None = None
    pipeline: str = Field("", description="diffusers class, where Auto cannot tell.")
    image_pipeline: str = ""
    vae: str = Field("", description="Repository or folder of a replacement VAE.")
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    steps: int | None = Field(None, ge=1, le=1000)
    max_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float = Field(5.0, ge=0, le=50)
    guidance_kwarg: Literal["guidance_scale", "true_cfg_scale"] = "guidance_scale"
    size: str = "1024x1024"
    max_sequence_length: int | None = Field(None, ge=1)
    memory_gib: float = Field(0.0, ge=0)
    licence: str = ""
    roles: tuple[Literal["large", "small"], ...] = ("large", "small")
    aliases: tuple[str, ...] = ()

    @field_validator("size")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if bool(self.repo) == (self.folder is not None):
            raise ValueError("name either a repo or a folder")
        if self.folder is not None and (self.revision or self.variant):
            raise ValueError("revision and variant belong to a repo; a folder has neither")
        return self

    @property
    def source(self) -> str:
        """What `from_pretrained` is given."""
        return str(self.folder) if self.folder is not None else self.repo

    @property
    def size_px(self) -> tuple[int, int]:
        return parse_size(self.size)

    def steps_for(self, requested: int | None, settings: Settings) -> int:
        """Steps of a full image: the request, else explicit settings, else this model, else the settings' default."""
        explicit = settings.num_inference_steps if "num_inference_steps" in settings.model_fields_set else None
        steps = requested or explicit or self.steps or settings.num_inference_steps
        return min(steps, self.max_steps) if self.max_steps else steps


def load_catalogue(models_file: Path | None = None) -> dict[str, ModelEntry]:
    """Every entry by name. Raises ConfigError with one line: file, entry, field and limit."""
    entries = _read(SHIPPED)
    if models_file is not None:
        entries |= _read(models_file)
    seen: dict[str, str] = {}
    for entry in entries.values():
        for alias in {a.lower() for a in entry.aliases}:
            if alias in seen:
                raise ConfigError(
                    f"models {seen[alias]!r} and {entry.name!r} are both called {alias!r}", field="aliases"
                )
            seen[alias] = entry.name
    return entries


def find(name: str, models_file: Path | None = None) -> ModelEntry:
    """The entry called ``name``, else the one with that alias, in any case. Raises ConfigError that lists the names."""
    entries = load_catalogue(models_file)
    wanted = name.lower()
    for entry in entries.values():
        if wanted == entry.name.lower():
            return entry
    for entry in entries.values():
        if wanted in {alias.lower() for alias in entry.aliases}:
            return entry
    raise ConfigError(f"no model {name!r} in the catalogue; there are: {', '.join(entries)}", field="model")


def canonical(name: str, settings: Settings) -> str:
    """The catalogue's name for a name or alias; names the catalogue does not know stay as they are."""
    try:
        return find(name, settings.models_file).name
    except ConfigError:
        return name


def named(settings: Settings) -> Settings:
    """The settings with both models by the catalogue's names, under which images are counted."""
    pair = {role: canonical(getattr(settings, role), settings) for role in ("large_model", "small_model")}
    return settings.model_copy(update=pair)


def missing_weights(entry: ModelEntry) -> str | None:
    """One line that says why a local model cannot be loaded; None when it looks complete, or is on the hub."""
    if entry.folder is None:
        return None
    if not entry.folder.is_dir():
        return f"model {entry.name!r}: there is no folder {entry.folder}"
    index = entry.folder / "model_index.json"
    if not index.is_file():
        return f"model {entry.name!r}: {entry.folder} has no model_index.json, so it is no diffusers pipeline"
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"model {entry.name!r}: {index} is not JSON: {error}"
    if not isinstance(parts, dict):
        return f"model {entry.name!r}: {index} is not a JSON object"
    for part, value in parts.items():
        if part.startswith("_") or not isinstance(value, list) or not value or not value[0]:
            continue
        if not (entry.folder / part).is_dir():
            shown = part if part.isprintable() else repr(part)
            return f"model {entry.name!r}: {entry.folder} lacks its {shown} folder"
    return None


def check_pair(settings: Settings) -> tuple[ModelEntry, ModelEntry]:
    """The large and small entries, checked as far as that goes without loading. Raises ConfigError."""
    pair = []
    for role, name in (("large", settings.large_model), ("small", settings.small_model)):
        entry = find(name, settings.models_file)
        if role not in entry.roles:
            raise ConfigError(f"model {entry.name!r} may not be the {role} model (roles: {', '.join(entry.roles)})")
        if problem := missing_weights(entry):
            raise ConfigError(problem, field=f"{role}_model")
        pair.append(entry)
    return pair[0], pair[1]


def _read(path: Path) -> dict[str, ModelEntry]:
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"cannot read the catalogue {path}: {error.strerror}", field="models_file") from error
    return dict(_parse(path, stamp))


@lru_cache(maxsize=8)
def _parse(path: Path, stamp: int) -> dict[str, ModelEntry]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the catalogue {path}: {error}", field="models_file") from error
    return {name: _entry(path, name, table) for name, table in tables.items()}


def _entry(path: Path, name: str, table: Any) -> ModelEntry:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name!r} must be a table, e.g. [{name}]", field=name)
    values = dict(table)
    if isinstance(folder := values.get("folder"), str):
        if not folder.isprintable():
            raise ConfigError(f"{path}: model {name!r}, field 'folder': has control characters", field="folder")
        values["folder"] = (path.parent / folder).resolve()
        values = _card(values["folder"]) | values
    try:
        return ModelEntry(name=name, **values)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        field = ".".join(str(part) for part in first["loc"]) or "entry"
        raise ConfigError(f"{path}: model {name!r}, field {field!r}: {first['msg']}", field=field) from error


def _card(folder: Path) -> dict[str, Any]:
    """Defaults that a folder brings along in its own ``modm.json``; unknown keys (training notes) are left out."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder / CARD}: {error}", field="folder") from error
    if not isinstance(card, dict):
        raise ConfigError(f"{folder / CARD} is not a JSON object", field="folder")
    keys = {
        "steps",
        "max_steps",
        "guidance_scale",
        "size",
        "max_sequence_length",
        "dtype",
        "pipeline",
        "image_pipeline",
    }
    found = {k: v for k, v in card.items() if k in keys}
    if isinstance(side := found.get("size"), int):
        found["size"] = f"{side}x{side}"
    return found
