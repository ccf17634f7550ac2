"""Draws pictures and captions in rows and columns as one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vssl_dist.text import printable

TILE_SIDE = 192
"""Side of a picture in pixels: a multiple of 16, 32, 64 and 96, usual sides of small images."""
PAGE_MARGIN = 28
TILE_GAP = 16
FRAME_WIDTH = 3
TITLE_HEIGHT = 64
HEADINGS_HEIGHT = 46
LINE_HEIGHT = 15
_MAX_TEXT_CHARACTERS = 500  # of a text; what is longer is never measured
_TEXT_COLOUR, _FADED_TEXT_COLOUR, _PAGE_COLOUR, _TILE_COLOUR = (
    "#1b1f24",
    "#6b7280",
    "#ffffff",
    "#f0f1f3",
)
# Okabe and Ito's colours, which the colour-blind tell apart, without the black.
_FRAME_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


@dataclass(frozen=True)
class Tile:
    """One picture of a page."""

    image: Image.Image
    caption: list[str]
    """Lines below the picture; the first one is bold where the picture has no frame."""
    number: int | None
    """Number of the frame's colour; None draws no frame."""
    marked_boxes: list[tuple[int, int, int, int]]
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
    pitch = _row_pitch(rows)
    width = 2 * PAGE_MARGIN + len(headings) * (TILE_SIDE + TILE_GAP) - TILE_GAP
    page_image = Image.new(
        "RGB",
        (width, PAGE_MARGIN + TITLE_HEIGHT + HEADINGS_HEIGHT + len(rows) * pitch),
        _PAGE_COLOUR,
    )
    pen = ImageDraw.Draw(page_image)
    _draw_text(pen, (PAGE_MARGIN, PAGE_MARGIN - 4), title[0], width - 2 * PAGE_MARGIN, (22, True))
    _draw_text(pen, (PAGE_MARGIN, PAGE_MARGIN + 28), title[1], width - 2 * PAGE_MARGIN, (13, False))
    for x, (heading, subheading) in enumerate(headings):
        left, top = tile_corner(x, 0, pitch)
        colour = _TEXT_COLOUR if x == 0 else _frame_colour(x - 1)
        pen.rectangle(
            (left, top - HEADINGS_HEIGHT, left + 18, top - HEADINGS_HEIGHT + 3), fill=colour
        )
        _draw_text(pen, (left, top - HEADINGS_HEIGHT + 6), heading, TILE_SIDE, (13, True))
        _draw_text(pen, (left, top - HEADINGS_HEIGHT + 23), subheading, TILE_SIDE, (11, False))
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            _draw_tile(page_image, pen, tile, tile_corner(x, y, pitch))
    return page_image


def tile_corner(x: int, y: int, pitch: int) -> tuple[int, int]:
    """Return left and top of a tile in pixels; ``pitch`` is the distance of two rows."""
    return PAGE_MARGIN + x * (
        TILE_SIDE + TILE_GAP
    ), PAGE_MARGIN + TITLE_HEIGHT + HEADINGS_HEIGHT + y * pitch


def _row_pitch(rows: Sequence[Sequence[Tile]]) -> int:
    lines = max((len(tile.caption) for row in rows for tile in row), default=0)
    return TILE_SIDE + 6 + LINE_HEIGHT * lines + TILE_GAP


def _draw_tile(
    page_image: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, left_top: tuple[int, int]
) -> None:
    left, top = left_top
    picture, scale = fit_to_tile(tile.image)
    x, y = left + (TILE_SIDE - picture.width) // 2, top + (TILE_SIDE - picture.height) // 2
    pen.rectangle((left, top, left + TILE_SIDE - 1, top + TILE_SIDE - 1), fill=_TILE_COLOUR)
    page_image.paste(picture, (x, y))
    for number, box in enumerate(tile.marked_boxes):
        scaled_edges = [round(scale * edge) for edge in box]
        # At least one pixel: a crop of a wide image may be thinner than its line.
        right, bottom = (
            max(scaled_edges[0], scaled_edges[2] - 1),
            max(scaled_edges[1], scaled_edges[3] - 1),
        )
        marked_rectangle = (x + scaled_edges[0], y + scaled_edges[1], x + right, y + bottom)
        pen.rectangle(marked_rectangle, outline=_frame_colour(number), width=2)
    if tile.number is not None:
        frame_box = (
            left - FRAME_WIDTH,
            top - FRAME_WIDTH,
            left + TILE_SIDE + FRAME_WIDTH - 1,
            top + TILE_SIDE + FRAME_WIDTH - 1,
        )
        pen.rectangle(frame_box, outline=_frame_colour(tile.number), width=FRAME_WIDTH)
    for number, line in enumerate(tile.caption):
        caption_corner = (left, top + TILE_SIDE + 7 + LINE_HEIGHT * number)
        _draw_text(pen, caption_corner, line, TILE_SIDE, (11, tile.number is None and number == 0))


def fit_to_tile(image: Image.Image) -> tuple[Image.Image, float]:
    """Scale an image so that it fits a tile, and return the factor, too.

    Small ones are enlarged by whole factors, so that their pixels stay visible.

    >>> fit_to_tile(Image.new("RGB", (32, 20)))[0].size
    (192, 120)
    """
    longer_side = max(image.size)
    scale = float(TILE_SIDE // longer_side) if longer_side <= TILE_SIDE else TILE_SIDE / longer_side
    scaled_size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.NEAREST if longer_side <= TILE_SIDE else Image.Resampling.LANCZOS
    return image.resize(scaled_size, resampling), scale


def _draw_text(
    pen: ImageDraw.ImageDraw,
    left_top: tuple[int, int],
    text: str,
    max_width: int,
    font_style: tuple[int, bool],
) -> None:
    """Write a line in a (size, bold) font, cut off after ``max_width`` pixels."""
    font = _load_font(*font_style)
    text = printable(text[:_MAX_TEXT_CHARACTERS])
    shortened_text = text
    while (
        shortened_text
        and pen.textlength(shortened_text if shortened_text == text else f"{shortened_text}…", font)
        > max_width
    ):
        shortened_text = shortened_text[:-1]
    text_colour = _TEXT_COLOUR if font_style[1] else _FADED_TEXT_COLOUR
    pen.text(
        left_top,
        shortened_text if shortened_text == text else f"{shortened_text}…",
        fill=text_colour,
        font=font,
    )


def _frame_colour(number: int) -> str:
    return _FRAME_COLOURS[number % len(_FRAME_COLOURS)]


@cache
def _load_font(size: int, bold: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load DejaVu Sans from matplotlib: Pillow's own font has hardly more than ASCII."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return ImageFont.load_default(size)
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(folder / name, size)
