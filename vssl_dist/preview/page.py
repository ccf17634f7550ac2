"""Draws pictures and captions in rows and columns as one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vssl_dist.text import printable

TILE = 192
"""Side of a picture in pixels: a multiple of 16, 32, 64 and 96, usual sides of small images."""
MARGIN = 28
GAP = 16
FRAME = 3
TITLE = 64
HEAD = 46
LINE = 15
_MAX_CHARACTERS = 500  # of a text; what is longer is never measured
_INK, _FADED, _PAPER, _MOUNT = "#1b1f24", "#6b7280", "#ffffff", "#f0f1f3"
# Okabe and Ito's colours, which the colour-blind tell apart, without the black.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


@dataclass(frozen=True)
class Tile:
    """One picture of a page."""

    image: Image.Image
    caption: list[str]
    """Lines below the picture; the first one is bold where the picture has no frame."""
    number: int | None
    """Number of the frame's colour; None draws no frame."""
    marks: list[tuple[int, int, int, int]]
    """Boxes drawn on the picture (left, top, right, bottom, in its pixels), each in the colour of
    its index."""


def draw_page(
    title: tuple[str, str], headings: Sequence[tuple[str, str]], rows: Sequence[Sequence[Tile]]
) -> Image.Image:
    """Draw a page.

    Args:
        title: A line for the whole page, and a smaller one below it.
        headings: A line for each column, and a smaller one below it.
        rows: The tiles, as many in each row as there are headings.

    Returns:
        An RGB image; the tile of row y and column x is at `tile_corner` (x, y).
    """
    pitch = _pitch(rows)
    width = 2 * MARGIN + len(headings) * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, MARGIN + TITLE + HEAD + len(rows) * pitch), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _text(pen, (MARGIN, MARGIN - 4), title[0], width - 2 * MARGIN, (22, True))
    _text(pen, (MARGIN, MARGIN + 28), title[1], width - 2 * MARGIN, (13, False))
    for x, (heading, subheading) in enumerate(headings):
        left, top = tile_corner(x, 0, pitch)
        colour = _INK if x == 0 else _colour(x - 1)
        pen.rectangle((left, top - HEAD, left + 18, top - HEAD + 3), fill=colour)
        _text(pen, (left, top - HEAD + 6), heading, TILE, (13, True))
        _text(pen, (left, top - HEAD + 23), subheading, TILE, (11, False))
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            _draw(sheet, pen, tile, tile_corner(x, y, pitch))
    return sheet


def tile_corner(x: int, y: int, pitch: int) -> tuple[int, int]:
    """Return left and top of a tile in pixels; ``pitch`` is the distance of two rows."""
    return MARGIN + x * (TILE + GAP), MARGIN + TITLE + HEAD + y * pitch


def _pitch(rows: Sequence[Sequence[Tile]]) -> int:
    lines = max((len(tile.caption) for row in rows for tile in row), default=0)
    return TILE + 6 + LINE * lines + GAP


def _draw(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, corner: tuple[int, int]
) -> None:
    left, top = corner
    picture, scale = fit_to_tile(tile.image)
    x, y = left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2
    pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=_MOUNT)
    sheet.paste(picture, (x, y))
    for number, box in enumerate(tile.marks):
        edges = [round(scale * edge) for edge in box]
        # At least one pixel: a crop of a wide image may be thinner than its line.
        right, bottom = max(edges[0], edges[2] - 1), max(edges[1], edges[3] - 1)
        corners = (x + edges[0], y + edges[1], x + right, y + bottom)
        pen.rectangle(corners, outline=_colour(number), width=2)
    if tile.number is not None:
        around = (left - FRAME, top - FRAME, left + TILE + FRAME - 1, top + TILE + FRAME - 1)
        pen.rectangle(around, outline=_colour(tile.number), width=FRAME)
    for number, line in enumerate(tile.caption):
        below = (left, top + TILE + 7 + LINE * number)
        _text(pen, below, line, TILE, (11, tile.number is None and number == 0))


def fit_to_tile(image: Image.Image) -> tuple[Image.Image, float]:
    """Scale an image so that it fits a tile, and return the factor, too.

    Small ones are enlarged by whole factors, so that their pixels stay visible.

    >>> fit_to_tile(Image.new("RGB", (32, 20)))[0].size
    (192, 120)
    """
    longest = max(image.size)
    scale = float(TILE // longest) if longest <= TILE else TILE / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.NEAREST if longest <= TILE else Image.Resampling.LANCZOS
    return image.resize(size, resampling), scale


def _text(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    room: int,
    style: tuple[int, bool],
) -> None:
    """Write a line in a (size, bold) font, cut off after ``room`` pixels."""
    font = _font(*style)
    text = printable(text[:_MAX_CHARACTERS])
    short = text
    while short and pen.textlength(short if short == text else f"{short}…", font) > room:
        short = short[:-1]
    fill = _INK if style[1] else _FADED
    pen.text(corner, short if short == text else f"{short}…", fill=fill, font=font)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load DejaVu Sans from matplotlib: Pillow's own font has hardly more than ASCII."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return ImageFont.load_default(size)
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(folder / name, size)
