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

from .agreement import dali_decoder, find_disagreement
from .encode import Encoded, encode_image
from .normalise import find_oddity, shrink, to_rgb_or_grey, truncation_allowed, without_warnings
from .structure import inspect_structure, read_orientation

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header: they are bombs, or need shrinking first."""

MAX_SIDE = 1_000_000
"""Longest side of a stored image: DALI decodes no longer PNG."""

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_LOSSY = ("JPEG", "WEBP")
_MIN_DECODED_ROWS = 0.5
"""Share of its rows that must decode for a damaged image to be salvaged."""
_OBJECT_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


@dataclass(frozen=True)
class Rules:
    """Limits for image files, and settings for those that are written anew."""

    max_pixels: int = MAX_PIXELS
    resize_short: int | None = None
    """Shrink so that the shorter side has so many pixels; never enlarge."""
    quality: int = 95
    """Quality of the JPEGs that have to be written anew."""
    salvage: bool = False
    """Keep what can be decoded of a damaged image."""


DEFAULT_RULES = Rules()


class Verdict(IntEnum):
    """What is to be done with an image file."""

    KEEP = 0
    REMAKE = 1
    SALVAGE = 2
    REJECT = 3


@dataclass(frozen=True)
class Finding:
    """What the examination of an image file found out."""

    verdict: Verdict
    reason: str = ""
    """Why it cannot stay as it is; "" if it can, or if only `Rules.resize_short` is why."""
    suffix: str = ""
    """Suffix under which the file is kept: ``"jpg"`` or ``"png"``."""
    height: int = 0
    width: int = 0
    """Width as the file has it, like the height: neither turned nor shrunk."""
    pillow_only: bool = False
    """Whether Pillow judged without DALI, which should have been asked and is not installed."""


def encode_png(pixels: NDArray[np.uint8]) -> Encoded:
    """Store pixels losslessly.

    Args:
        pixels: ``(H, W, 3)`` or ``(H, W)`` uint8.

    >>> encode_png(np.zeros((2, 5, 3), np.uint8)).width
    5
    """
    return encode_image(Image.fromarray(pixels), None)


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
        with without_warnings():
            image = _open(data)
    except Image.DecompressionBombError:
        return _too_large("its", rules)
    # Pillow's parsers raise nearly anything on a damaged file, and all of it means the same.
    except Exception as error:
        return _rejection(error)
    height, width = image.height, image.width
    format_name = image.format
    # Before a pixel is decoded: a decompression bomb is small until then.
    if height * width > rules.max_pixels:
        return _too_large(f"{width}x{height}", rules)
    if _stored_long_side(height, width, rules) > MAX_SIDE:
        return Finding(
            Verdict.REJECT, f"{width}x{height} pixels: no side may have more than {MAX_SIDE}"
        )
    report = inspect_structure(data, format_name)
    if report.refusal:
        return Finding(Verdict.REJECT, f"not a readable image ({report.refusal})")
    try:
        with without_warnings():
            if report.damage:
                raise ValueError(report.damage)
            oddity = find_oddity(image) or report.oddity
            pillow_only = False
            if oddity:
                _to_upright(image, data)
            elif report.is_plain:
                _decode_plain(image)
            else:
                oddity, pillow_only = _second_opinion(data, image)
    except Exception as error:
        rejection = _rejection(error, height * width)
        return _rescue(data, rejection, height * width) if rules.salvage else rejection
    shrinks = rules.resize_short is not None and min(height, width) > rules.resize_short
    verdict = Verdict.REMAKE if oddity or shrinks else Verdict.KEEP
    return Finding(
        verdict, oddity, "jpg" if format_name == "JPEG" else "png", height, width, pillow_only
    )


def _stored_long_side(height: int, width: int, rules: Rules) -> float:
    """Compute the longer side of the picture that will be stored."""
    short, long = sorted((height, width))
    return long * min(1.0, (rules.resize_short or short) / max(1, short))


def _decode_plain(image: Image.Image) -> None:
    if image.format == "JPEG":
        # At an eighth of the size all of the file is still parsed and its entropy code
        # decoded, which is where damage shows; only the arithmetic is left out.
        image.draft("L", (1, 1))
    image.load()


def _second_opinion(data: bytes, image: Image.Image) -> tuple[str, bool]:
    """Compare with DALI; returns the disagreement, and whether Pillow judged without DALI."""
    image.load()
    decode = dali_decoder()
    if decode is None:
        return "", True
    return find_disagreement(data, np.asarray(image), decode), False


def encode_to_store(data: bytes, finding: Finding, rules: Rules) -> Encoded:
    """Make the bytes that are stored for a file that was not rejected.

    Args:
        data: The file's bytes.
        finding: What `examine` said of them; not a rejection.
        rules: What `examine` was called with.
    """
    if finding.verdict is Verdict.KEEP:
        return Encoded(data, finding.suffix, finding.height, finding.width)
    with without_warnings(), truncation_allowed(finding.verdict is Verdict.SALVAGE):
        image = _open(data)
        lossy = image.format in _LOSSY
        upright = shrink(_to_upright(image, data), rules.resize_short)
    # A new image: the old one's metadata (EXIF, colour profile) would be saved along.
    clean = Image.frombytes(upright.mode, upright.size, upright.tobytes())
    return encode_image(clean, rules.quality if lossy else None)


def _open(data: bytes) -> Image.Image:
    """Open a file with Pillow, stripped of what stands around its picture."""
    return Image.open(io.BytesIO(strip_metadata(data)), formats=_FORMATS)


def _to_upright(image: Image.Image, data: bytes) -> Image.Image:
    return to_rgb_or_grey(image, read_orientation(image, data))


def _too_large(size: str, rules: Rules) -> Finding:
    limit = f"{size} pixels are more than the limit of {rules.max_pixels}"
    return Finding(Verdict.REJECT, f"{limit} (--max-pixels)")


def _unreadable_reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        reason = "of no known format"
    else:
        reason = " ".join(_OBJECT_ADDRESS.sub("it", str(error)).split()) or type(error).__name__
    return f"not a readable image ({reason})"


def _rejection(error: Exception, pixels: int = 0) -> Finding:
    """Turn a decoder's error into a rejection.

    Raises:
        MemoryError: Memory ran out, which says nothing about the file.
    """
    if is_out_of_memory(error, pixels):
        raise MemoryError(_unreadable_reason(error)) from error
    return Finding(Verdict.REJECT, _unreadable_reason(error))


def _rescue(data: bytes, rejection: Finding, pixels: int) -> Finding:
    """Turn a rejection into a salvage if enough of the damaged image can be decoded."""
    try:
        with without_warnings(), truncation_allowed(True):
            image = _to_upright(_open(data), data)
    except Exception as error:
        _rejection(error, pixels)
        return rejection
    rows = np.asarray(image).reshape(image.height, image.width, -1)
    # What was not decoded is rows of one colour.
    decoded = (rows != rows[:, :1]).any(axis=(1, 2)).mean()
    return (
        replace(rejection, verdict=Verdict.SALVAGE) if decoded >= _MIN_DECODED_ROWS else rejection
    )
