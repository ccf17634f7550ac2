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

from .agreement import dali_decoder, find_decoder_disagreement
from .encode import EncodedImage, encode_image
from .normalise import (
    allow_truncated_images,
    find_remake_reason,
    shrink,
    to_rgb_or_grey,
    without_pillow_warnings,
)
from .structure import inspect_structure, read_orientation

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header: they are bombs, or need shrinking first."""

MAX_STORED_SIDE = 1_000_000
"""Longest side of a stored image: DALI decodes no longer PNG."""

_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_LOSSY_FORMATS = ("JPEG", "WEBP")
_MIN_DECODED_ROW_SHARE = 0.5
"""Share of its rows that must decode for a damaged image to be salvaged."""
_OBJECT_ADDRESS_PATTERN = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


@dataclass(frozen=True)
class ImageRules:
    """Limits for image files, and settings for those that are written anew."""

    max_pixels: int = MAX_PIXELS
    resize_short: int | None = None
    """Shrink so that the shorter side has so many pixels; never enlarge."""
    quality: int = 95
    """Quality of the JPEGs that have to be written anew."""
    salvage: bool = False
    """Keep what can be decoded of a damaged image."""


DEFAULT_RULES = ImageRules()


class ImageVerdict(IntEnum):
    """What is to be done with an image file."""

    KEEP = 0
    ENCODE_ANEW = 1
    SALVAGE = 2
    REJECT = 3


@dataclass(frozen=True)
class ImageFinding:
    """What the examination of an image file found out."""

    verdict: ImageVerdict
    reason: str = ""
    """Why it cannot stay as it is; "" if it can, or if only `ImageRules.resize_short` is why."""
    suffix: str = ""
    """Suffix under which the file is kept: ``"jpg"`` or ``"png"``."""
    height: int = 0
    width: int = 0
    """Width as the file has it, like the height: neither turned nor shrunk."""
    pillow_only: bool = False
    """Whether Pillow judged without DALI, which should have been asked and is not installed."""


def encode_png(pixels: NDArray[np.uint8]) -> EncodedImage:
    """Store pixels losslessly.

    Args:
        pixels: ``(H, W, 3)`` or ``(H, W)`` uint8.

    >>> encode_png(np.zeros((2, 5, 3), np.uint8)).width
    5
    """
    return encode_image(Image.fromarray(pixels), None)


def examine_image(data: bytes, rules: ImageRules) -> ImageFinding:
    """Find out whether a file can be kept; decodes all of it, but only after its header.

    Whatever is wrong with the file becomes a finding, in words that are the same on every
    machine.

    Raises:
        MemoryError: There was none left, which says nothing about the file.
    """
    if not data:
        return ImageFinding(ImageVerdict.REJECT, "not a readable image (empty file)")
    try:
        with without_pillow_warnings():
            image = _open_image(data)
    except Image.DecompressionBombError:
        return _reject_too_large("its", rules)
    # Pillow's parsers raise nearly anything on a damaged file, and all of it means the same.
    except Exception as error:
        return _reject_undecodable(error)
    height, width = image.height, image.width
    format_name = image.format
    # Before a pixel is decoded: a decompression bomb is small until then.
    if height * width > rules.max_pixels:
        return _reject_too_large(f"{width}x{height}", rules)
    if _long_side_to_store(height, width, rules) > MAX_STORED_SIDE:
        return ImageFinding(
            ImageVerdict.REJECT,
            f"{width}x{height} pixels: no side may have more than {MAX_STORED_SIDE}",
        )
    structure = inspect_structure(data, format_name)
    if structure.refusal:
        return ImageFinding(ImageVerdict.REJECT, f"not a readable image ({structure.refusal})")
    try:
        with without_pillow_warnings():
            if structure.damage:
                raise ValueError(structure.damage)
            remake_reason = find_remake_reason(image) or structure.remake_reason
            pillow_only = False
            if remake_reason:
                _to_upright(image, data)
            elif structure.is_plain:
                _decode_plain_image(image)
            else:
                remake_reason, pillow_only = _compare_with_dali(data, image)
    except Exception as error:
        rejection = _reject_undecodable(error, height * width)
        return _try_salvage(data, rejection, height * width) if rules.salvage else rejection
    must_shrink = rules.resize_short is not None and min(height, width) > rules.resize_short
    verdict = ImageVerdict.ENCODE_ANEW if remake_reason or must_shrink else ImageVerdict.KEEP
    return ImageFinding(
        verdict,
        remake_reason,
        "jpg" if format_name == "JPEG" else "png",
        height,
        width,
        pillow_only,
    )


def _long_side_to_store(height: int, width: int, rules: ImageRules) -> float:
    """Compute the longer side of the picture that will be stored."""
    short_side, long_side = sorted((height, width))
    return long_side * min(1.0, (rules.resize_short or short_side) / max(1, short_side))


def _decode_plain_image(image: Image.Image) -> None:
    if image.format == "JPEG":
        # At an eighth of the size all of the file is still parsed and its entropy code
        # decoded, which is where damage shows; only the arithmetic is left out.
        image.draft("L", (1, 1))
    image.load()


def _compare_with_dali(data: bytes, image: Image.Image) -> tuple[str, bool]:
    """Compare with DALI; returns the disagreement, and whether Pillow judged without DALI."""
    image.load()
    decode = dali_decoder()
    if decode is None:
        return "", True
    return find_decoder_disagreement(data, np.asarray(image), decode), False


def encode_to_store(data: bytes, finding: ImageFinding, rules: ImageRules) -> EncodedImage:
    """Make the bytes that are stored for a file that was not rejected.

    Args:
        data: The file's bytes.
        finding: What `examine_image` said of them; not a rejection.
        rules: What `examine_image` was called with.
    """
    if finding.verdict is ImageVerdict.KEEP:
        return EncodedImage(data, finding.suffix, finding.height, finding.width)
    with without_pillow_warnings(), allow_truncated_images(finding.verdict is ImageVerdict.SALVAGE):
        image = _open_image(data)
        is_lossy = image.format in _LOSSY_FORMATS
        upright_image = shrink(_to_upright(image, data), rules.resize_short)
    # A new image: the old one's metadata (EXIF, colour profile) would be saved along.
    image_without_metadata = Image.frombytes(
        upright_image.mode, upright_image.size, upright_image.tobytes()
    )
    return encode_image(image_without_metadata, rules.quality if is_lossy else None)


def _open_image(data: bytes) -> Image.Image:
    """Open a file with Pillow, stripped of what stands around its picture."""
    return Image.open(io.BytesIO(strip_metadata(data)), formats=_PILLOW_FORMATS)


def _to_upright(image: Image.Image, data: bytes) -> Image.Image:
    return to_rgb_or_grey(image, read_orientation(image, data))


def _reject_too_large(size: str, rules: ImageRules) -> ImageFinding:
    limit_text = f"{size} pixels are more than the limit of {rules.max_pixels}"
    return ImageFinding(ImageVerdict.REJECT, f"{limit_text} (--max-pixels)")


def _describe_decoder_error(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        reason = "of no known format"
    else:
        reason = (
            " ".join(_OBJECT_ADDRESS_PATTERN.sub("it", str(error)).split()) or type(error).__name__
        )
    return f"not a readable image ({reason})"


def _reject_undecodable(error: Exception, num_pixels: int = 0) -> ImageFinding:
    """Turn a decoder's error into a rejection.

    Raises:
        MemoryError: Memory ran out, which says nothing about the file.
    """
    if is_out_of_memory(error, num_pixels):
        raise MemoryError(_describe_decoder_error(error)) from error
    return ImageFinding(ImageVerdict.REJECT, _describe_decoder_error(error))


def _try_salvage(data: bytes, rejection: ImageFinding, num_pixels: int) -> ImageFinding:
    """Turn a rejection into a salvage if enough of the damaged image can be decoded."""
    try:
        with without_pillow_warnings(), allow_truncated_images(True):
            image = _to_upright(_open_image(data), data)
    except Exception as error:
        _reject_undecodable(error, num_pixels)
        return rejection
    rows = np.asarray(image).reshape(image.height, image.width, -1)
    # What was not decoded is rows of one colour.
    decoded_row_share = (rows != rows[:, :1]).any(axis=(1, 2)).mean()
    return (
        replace(rejection, verdict=ImageVerdict.SALVAGE)
        if decoded_row_share >= _MIN_DECODED_ROW_SHARE
        else rejection
    )
