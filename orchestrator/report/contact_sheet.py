"""A contact sheet: prompt, source image, refined image, and the numbers between them."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

TILE_PX = 160
GAP_PX = 12
ARROW_PX = 30
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
    from PIL import Image, ImageDraw

    cell_w = TEXT_PX + 2 * TILE_PX + ARROW_PX + 3 * GAP_PX
    cell_h = TILE_PX + 2 * GAP_PX
    rows = max(1, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = _font(13), _font(11)
    for index, pair in enumerate(pairs):
        x = (index % columns) * cell_w + GAP_PX
        y = (index // columns) * cell_h + GAP_PX
        words = _wrap(pair.prompt, 34, 5)
        draw.multiline_text((x, y), "\n".join(words), fill="#111111", font=font, spacing=3)
        below = [_printable(pair.caption)]
        if pair.source_prompt:
            below += _wrap(f"source: {pair.source_prompt}", 40, 3)
        draw.multiline_text((x, y + 92), "\n".join(below), fill="#555555", font=small, spacing=3)
        left = x + TEXT_PX
        if pair.source is not None:
            sheet.paste(_tile(pair.source), (left, y))
            _arrow(draw, left + TILE_PX + 5, y + TILE_PX // 2, ARROW_PX - 10)
        sheet.paste(_tile(pair.result), (left + TILE_PX + ARROW_PX, y))
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's DejaVu Sans, which has Greek and Cyrillic too; Pillow's own font where it is not there."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    try:
        return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size - 1)
    except OSError:
        return ImageFont.load_default(size=size)


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int, length: int) -> None:
    draw.line([(x, y), (x + length - 6, y)], fill="#333333", width=2)
    draw.polygon([(x + length - 8, y - 5), (x + length, y), (x + length - 8, y + 5)], fill="#333333")


def _wrap(text: str, width: int, lines: int) -> list[str]:
    return textwrap.wrap(_printable(text), width, max_lines=lines, placeholder=" …")


def _tile(png: bytes) -> Image.Image:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        tile = image.convert("RGB")
    scale = TILE_PX / max(tile.size)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
