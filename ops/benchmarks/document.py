"""The JSON document of a benchmark: to stdout, and to a file where one was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def hand_over(found: dict[str, Any], out: Path | None) -> None:
    """Print it, and write it to ``out`` if given."""
    text = json.dumps(found, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
