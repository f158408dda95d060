"""A contact sheet of search results: one HTML page without outside references, or one PNG."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modm_tasks.errors import InvalidInputError
from modm_tasks.image_store import decode_image

_TILE_PX, _TEXT_PX, _COLUMNS = 192, 34, 5


def write_sheet(path: Path, title: str, items: Sequence[tuple[Mapping[str, Any], bytes]]) -> None:
    """``items`` are (entry as JSON, PNG bytes). Raises InvalidInputError for another suffix or a path not writable."""
    makers = {".html": _html, ".png": _png}
    make = makers.get(path.suffix.lower())
    if make is None:
        raise InvalidInputError(f"a contact sheet is .html or .png, not {path.name!r}", field="sheet")
    try:
        path.write_bytes(make(title, items))
    except OSError as error:
        raise InvalidInputError(f"cannot write {path}: {error.strerror}", field="sheet") from error


def _caption(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('similarity') or 0.0:.4f}  {entry['prompt']}"


def _html(title: str, items: Sequence[tuple[Mapping[str, Any], bytes]]) -> bytes:
    tiles = "".join(
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{html.escape(_caption(entry))}</figcaption></figure>"
        for entry, data in items
    )
    style = (
        "body{font:14px sans-serif;margin:2em}main{display:flex;flex-wrap:wrap;gap:1em}"
        "figure{margin:0;width:12em}img{width:12em}figcaption{overflow-wrap:anywhere}"
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{style}</style><h1>{html.escape(title)}</h1><main>{tiles}</main></html>\n".encode()


def _png(title: str, items: Sequence[tuple[Mapping[str, Any], bytes]]) -> bytes:
    import io

    from PIL import Image, ImageDraw

    rows = max(1, -(-len(items) // _COLUMNS))
    sheet = Image.new("RGB", (_COLUMNS * _TILE_PX, _TEXT_PX + rows * (_TILE_PX + _TEXT_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), _ascii(title, 120), fill="black")
    for number, (entry, data) in enumerate(items):
        left, top = number % _COLUMNS * _TILE_PX, _TEXT_PX + number // _COLUMNS * (_TILE_PX + _TEXT_PX)
        tile = decode_image(data)
        tile.thumbnail((_TILE_PX - 4, _TILE_PX - 4))
        sheet.paste(tile, (left + 2, top + 2))
        text = _ascii(_caption(entry), 58)
        draw.multiline_text((left + 2, top + _TILE_PX), f"{text[:29]}\n{text[29:]}", fill="black", spacing=2)
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def _ascii(text: str, width: int) -> str:
    """Pillow's built-in font draws Latin letters only, and breaks lines at newlines."""
    return " ".join(text.encode("ascii", "replace").decode().split())[:width]
