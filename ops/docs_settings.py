"""Writes docs/settings.md from the settings model: `python -m ops.docs_settings` (`--check`: exit 1 when it is stale)."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from modm_tasks.settings import Section, Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"

HEAD = """# Settings

Made by `make docs` from the settings model (`modm_tasks/settings.py`); a test checks that this page is current.

Command line over environment over `modm.toml` (or the file that `MODM_CONFIG` names) over the defaults. In the file a
section is a table: `[cache]`, `capacity = 20000`; in the environment it is two underscores: `MODM_CACHE__CAPACITY=20000`.
A name that is not here is an error. `modm config show` prints what is in force, secrets hidden.
"""


def type_name(annotation: object) -> str:
    """A short name a reader of a table understands."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " \\| ".join(str(a) or '""' for a in typing.get_args(annotation))
    if origin in {typing.Union, types.UnionType}:
        return " or ".join("unset" if a is type(None) else type_name(a) for a in typing.get_args(annotation))
    name = getattr(annotation, "__name__", str(annotation))
    return {"SecretStr": "secret", "str": "text", "bool": "true, false", "float": "number", "int": "integer"}.get(
        name, name.lower()
    )


def limits(field: FieldInfo) -> str:
    signs = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}
    found = [
        f"{signs[type(m)]} {next(iter(vars(m).values() if hasattr(m, '__dict__') else (getattr(m, m.__slots__[0]),))):g}"
        for m in field.metadata
        if type(m) in signs
    ]
    return ", ".join(found)


def row(name: str, variable: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = (
        ""
        if default is None or default == ""
        else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    )
    kind = ", ".join(filter(None, [type_name(field.annotation), limits(field)]))
    text = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | `{variable}` | {shown} | {kind} | {text} |"


def render() -> str:
    """The whole page."""
    head = ["| Setting | Environment | Default | Values | Meaning |", "|---|---|---|---|---|"]
    top, sections = [], []
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            doc = (kind.__doc__ or "").strip().splitlines()[0]
            variable = f"MODM_{name.upper()}__"
            rows = [row(f"{name}.{s}", f"{variable}{s.upper()}", inner) for s, inner in kind.model_fields.items()]
            sections += [f"\n## `[{name}]` {doc}\n", *head, *rows]
        else:
            top.append(row(name, f"MODM_{name.upper()}", field))
    return "\n".join([HEAD, "## General\n", *head, *top, *sections]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or compare it."""
    if "--check" in (sys.argv[1:] if argv is None else argv):
        stale = not PAGE.exists() or PAGE.read_text() != render()
        if stale:
            print("docs/settings.md is stale: run `make docs`", file=sys.stderr)
        return int(stale)
    PAGE.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
