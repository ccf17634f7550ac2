"""One image file in, bytes that every decoder of the project reads alike out.

An 8-bit RGB or greyscale JPEG or PNG that decodes to its last row is kept byte for byte: a
plain one when Pillow decodes it, any other when Pillow and DALI, which trainings use, show the
same picture.  What stands around the picture is skipped, not judged.  Everything that decoders
treat differently (CMYK, palettes, transparency, 16 bits, EXIF rotation, other formats) is
turned into plain RGB or grey once, here.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vssl_dist.data.backends.memory import is_out_of_memory
from vssl_dist.data.bare import strip_metadata

from .agreement import dali, objection
from .encode import Encoded, encode
from .normalise import lenient, oddity, quietly, shrunk, to_rgb_or_grey
from .structure import orientation, structure

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header: they are bombs, or need shrinking first."""

MAX_SIDE = 1_000_000
"""Of what is stored: DALI decodes no PNG beyond."""

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_LOSSY = ("JPEG", "WEBP")
_WORTH = 0.5
"""Share of its rows that must be left of a damaged image."""
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


@dataclass(frozen=True)
class Rules:
    """What becomes of an image file."""

    max_pixels: int = MAX_PIXELS
    resize_short: int | None = None
    """Shrink so that the shorter side has so many pixels; never enlarge."""
    quality: int = 95
    """Of the JPEGs that have to be written anew."""
    salvage: bool = False
    """Keep what can be decoded of a damaged image."""


DEFAULT = Rules()


class Verdict(IntEnum):
    """What is to be done with an image file."""

    KEEP = 0
    REMAKE = 1
    SALVAGE = 2
    REJECT = 3


@dataclass(frozen=True)
class Finding:
    """What a look at an image file gave."""

    verdict: Verdict
    reason: str = ""
    """Why it cannot stay as it is; "" if it can, or if only `Rules.resize_short` is why."""
    suffix: str = ""
    """Of a file to keep: ``"jpg"`` or ``"png"``."""
    height: int = 0
    width: int = 0
    """As the file has it, like the height: neither turned nor shrunk."""
    alone: bool = False
    """Whether Pillow decided alone what DALI should have been asked about, and is not there."""


def encode_png(pixels: NDArray[np.uint8]) -> Encoded:
    """Store pixels losslessly.

    Args:
        pixels: ``(H, W, 3)`` or ``(H, W)`` uint8.

    >>> encode_png(np.zeros((2, 5, 3), np.uint8)).width
    5
    """
    return encode(Image.fromarray(pixels), None)


def examine(data: bytes, rules: Rules) -> Finding:
    """Find out whether a file can be kept; decodes all of it, but only after its header.

    Whatever is wrong with the file becomes a finding, in words that are the same on every
    machine.

    Raises:
        MemoryError: There was none left, which says nothing about the file.
    """
    if not data:
        return Finding(Verdict.REJECT, "not a readable image (empty file)")
    try:
        with quietly():
            image = _opened(data)
    except Image.DecompressionBombError:
        return _too_large("its", rules)
    # Pillow's parsers raise nearly anything on a damaged file, and all of it means the same.
    except Exception as error:
        return _rejected(error)
    height, width, kind = image.height, image.width, image.format
    if height * width > rules.max_pixels:
        return _too_large(f"{width}x{height}", rules)
    if _side(height, width, rules) > MAX_SIDE:
        return Finding(
            Verdict.REJECT, f"{width}x{height} pixels: no side may have more than {MAX_SIDE}"
        )
    form = structure(data, kind)
    if form.endless:
        return Finding(Verdict.REJECT, f"not a readable image ({form.endless})")
    try:
        with quietly():
            if form.broken:
                raise ValueError(form.broken)
            odd, alone = oddity(image) or form.odd, False
            if odd:
                _upright(image, data)
            elif form.plain:
                _decode_plain(image)
            else:
                odd, alone = _second_opinion(data, image)
    except Exception as error:
        rejected = _rejected(error, height * width)
        return _rescue(data, rejected, height * width) if rules.salvage else rejected
    shrinks = rules.resize_short is not None and min(height, width) > rules.resize_short
    verdict = Verdict.REMAKE if odd or shrinks else Verdict.KEEP
    return Finding(verdict, odd, "jpg" if kind == "JPEG" else "png", height, width, alone)


def _side(height: int, width: int, rules: Rules) -> float:
    """The longer side of what will be stored."""
    short, long = sorted((height, width))
    return long * min(1.0, (rules.resize_short or short) / max(1, short))


def _decode_plain(image: Image.Image) -> None:
    if image.format == "JPEG":
        # At an eighth of the size all of the file is still parsed and its entropy code
        # decoded, which is where damage shows; only the arithmetic is left out.
        image.draft("L", (1, 1))
    image.load()


def _second_opinion(data: bytes, image: Image.Image) -> tuple[str, bool]:
    """What DALI objects to, and whether it could not be asked."""
    image.load()
    decode = dali()
    if decode is None:
        return "", True
    return objection(data, np.asarray(image), decode), False


def make(data: bytes, finding: Finding, rules: Rules) -> Encoded:
    """Do with a file what was found necessary.

    Args:
        data: The file's bytes.
        finding: What `examine` said of them; not a rejection.
        rules: The same as then.
    """
    if finding.verdict is Verdict.KEEP:
        return Encoded(data, finding.suffix, finding.height, finding.width)
    with quietly(), lenient(finding.verdict is Verdict.SALVAGE):
        image = _opened(data)
        lossy = image.format in _LOSSY
        upright = shrunk(_upright(image, data), rules.resize_short)
    # A new image: the old one's metadata (EXIF, colour profile) would be saved along.
    clean = Image.frombytes(upright.mode, upright.size, upright.tobytes())
    return encode(clean, rules.quality if lossy else None)


def _opened(data: bytes) -> Image.Image:
    """By Pillow, which is shown the picture alone."""
    return Image.open(io.BytesIO(strip_metadata(data)), formats=_FORMATS)


def _upright(image: Image.Image, data: bytes) -> Image.Image:
    return to_rgb_or_grey(image, orientation(image, data))


def _too_large(size: str, rules: Rules) -> Finding:
    limit = f"{size} pixels are more than the limit of {rules.max_pixels}"
    return Finding(Verdict.REJECT, f"{limit} (--max-pixels)")


def _unreadable(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        reason = "of no known format"
    else:
        reason = " ".join(_ADDRESS.sub("it", str(error)).split()) or type(error).__name__
    return f"not a readable image ({reason})"


def _rejected(error: Exception, pixels: int = 0) -> Finding:
    """What an error says of an image.

    Raises:
        MemoryError: It says nothing: memory ran out.
    """
    if is_out_of_memory(error, pixels):
        raise MemoryError(_unreadable(error)) from error
    return Finding(Verdict.REJECT, _unreadable(error))


def _rescue(data: bytes, rejected: Finding, pixels: int) -> Finding:
    """Whether enough of a damaged image can be decoded."""
    try:
        with quietly(), lenient(True):
            image = _upright(_opened(data), data)
    except Exception as error:
        _rejected(error, pixels)
        return rejected
    rows = np.asarray(image).reshape(image.height, image.width, -1)
    # What was not decoded is rows of one colour.
    decoded = (rows != rows[:, :1]).any(axis=(1, 2)).mean()
    return replace(rejected, verdict=Verdict.SALVAGE) if decoded >= _WORTH else rejected
