"""Contact sheets: rendered, large and small side by side; and refined pictures beside their sources, by rung."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ops.scenes.export import ROOT

FOLDER = ROOT / "docs" / "images"
#: A picture is shown at this many pixels, with a gap around it.
TILE, GAP, LABEL = 96, 4, 112


def three_rows_sheet(
    texts: Sequence[str],
    rendered: Sequence[Image.Image],
    large: Sequence[Image.Image],
    small: Sequence[Image.Image],
    path: Path = FOLDER / "scenes-rendered-large-small.png",
) -> None:
    """24 prompts spread over the set; each a column of three: what was asked, `scenes-large`, `scenes-small`."""
    picks = range(0, len(texts), max(1, len(texts) // 24))[:24]
    columns = 12
    blocks = [picks[i : i + columns] for i in range(0, len(picks), columns)]
    rows = [(name, images, block) for block in blocks for name, images in _named(rendered, large, small)]
    sheet, draw = _sheet(columns, len(rows))
    for r, (name, images, block) in enumerate(rows):
        draw.text((GAP, r * (TILE + GAP) + TILE // 2), name, fill="black")
        for c, index in enumerate(block):
            _paste(sheet, images[index], r, c)
    _save(sheet, path)


def refined_sheet(
    shown: dict[int, list[tuple[str, Image.Image, str, Image.Image]]], path: Path = FOLDER / "scenes-refined.png"
) -> None:
    """Per rung two rows: the cached source, and below it what `scenes-small` made of it for the new prompt."""
    sheet, draw = _sheet(8, 2 * max(1, len(shown)))
    for r, (depth, pairs) in enumerate(shown.items()):
        for offset, name in enumerate((f"k={depth}: source", f"k={depth}: refined")):
            draw.text((GAP, (2 * r + offset) * (TILE + GAP) + TILE // 2), name, fill="black")
        for c, (_, source, _, refined) in enumerate(pairs):
            _paste(sheet, source, 2 * r, c)
            _paste(sheet, refined, 2 * r + 1, c)
    _save(sheet, path)


def _named(
    rendered: Sequence[Image.Image], large: Sequence[Image.Image], small: Sequence[Image.Image]
) -> list[tuple[str, Sequence[Image.Image]]]:
    return [("rendered", rendered), ("scenes-large", large), ("scenes-small", small)]


def _sheet(columns: int, rows: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (LABEL + columns * (TILE + GAP), rows * (TILE + GAP) + GAP), "white")
    return sheet, ImageDraw.Draw(sheet)


def _paste(sheet: Image.Image, image: Image.Image, row: int, column: int) -> None:
    tile = image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    sheet.paste(tile, (LABEL + column * (TILE + GAP), row * (TILE + GAP) + GAP))


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
