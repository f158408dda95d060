"""A contact sheet: prompt, source image, refined image, and the numbers between them."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

TILE_PX = 160
GAP_PX = 12
TEXT_PX = 250


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row. ``source`` None = drawn from nothing. Images as PNG bytes."""

    prompt: str
    result: bytes
    source: bytes | None = None
    caption: str = ""
    source_prompt: str = ""


def contact_sheet(pairs: Sequence[Pair], *, columns: int = 2) -> bytes:
    """PNG with a cell per pair: words, source, arrow, result."""
    from PIL import Image, ImageDraw, ImageFont

    cell_w = TEXT_PX + 2 * TILE_PX + 4 * GAP_PX
    cell_h = TILE_PX + 2 * GAP_PX
    rows = max(1, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    small = ImageFont.load_default(size=11)
    for index, pair in enumerate(pairs):
        x = (index % columns) * cell_w + GAP_PX
        y = (index // columns) * cell_h + GAP_PX
        words = textwrap.wrap(_printable(pair.prompt), 36)[:5]
        draw.multiline_text((x, y), "\n".join(words), fill="#111111", font=font, spacing=3)
        below = [_printable(pair.caption)]
        if pair.source_prompt:
            below += textwrap.wrap(f"source: {_printable(pair.source_prompt)}", 42)[:3]
        draw.multiline_text((x, y + 92), "\n".join(below), fill="#555555", font=small, spacing=3)
        left = x + TEXT_PX
        if pair.source is not None:
            sheet.paste(_tile(pair.source), (left, y))
            draw.text((left + TILE_PX - 2, y + TILE_PX // 2 - 8), ">", fill="#333333", font=font)
        sheet.paste(_tile(pair.result), (left + TILE_PX + GAP_PX, y))
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def _tile(png: bytes) -> Image.Image:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        tile = image.convert("RGB")
    scale = TILE_PX / max(tile.size)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
