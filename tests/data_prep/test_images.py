"""What happens to an image file on its way into a shard, against Pillow's own conversions."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.images import MAX_PIXELS, encode_png, plain
from tests.support.photos import crop
from vssl_dist.data.shards import DataError

PHOTO = Image.fromarray(crop(0, 16, (90, 140)))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("image", "kind", "suffix"),
    [
        (PHOTO, "JPEG", "jpg"),
        (PHOTO.convert("L"), "JPEG", "jpg"),
        (PHOTO, "PNG", "png"),
        (PHOTO.convert("L"), "PNG", "png"),
    ],
)
def test_a_plain_file_is_kept_byte_for_byte(image: Image.Image, kind: str, suffix: str) -> None:
    data = saved(image, kind)
    kept = plain(data, "x")
    assert (kept.data, kept.suffix) == (data, suffix)
    assert (kept.width, kept.height) == image.size


def wide(image: Image.Image) -> bytes:
    """A 16-bit grey PNG whose upper bytes are the image."""
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 256 + 77
    return saved(Image.fromarray(grey), "PNG")


@pytest.mark.parametrize(
    ("data", "golden"),
    [
        (saved(PHOTO.convert("RGBA"), "PNG"), PHOTO),
        (saved(PHOTO.convert("LA"), "PNG"), PHOTO.convert("L")),
        (saved(PHOTO.quantize(64), "PNG"), PHOTO.quantize(64)),
        (saved(PHOTO.convert("1"), "PNG"), PHOTO.convert("1")),
        (saved(PHOTO, "BMP"), PHOTO),
        (saved(PHOTO, "TIFF"), PHOTO),
        (saved(PHOTO, "PPM"), PHOTO),
        (saved(PHOTO.quantize(64), "GIF"), PHOTO.quantize(64)),
        (wide(PHOTO), PHOTO.convert("L")),
    ],
    ids=["rgba", "grey+alpha", "palette", "bilevel", "bmp", "tiff", "ppm", "gif", "16 bit"],
)
def test_lossless_oddities_become_the_png_of_their_pixels(data: bytes, golden: Image.Image) -> None:
    made = plain(data, "x")
    assert made.suffix == "png"
    assert plain(made.data, "x").data == made.data
    np.testing.assert_array_equal(pixels(made.data), np.asarray(golden.convert("RGB")))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png")):
        data = saved(PHOTO, kind, exif=exif)
        made = plain(data, "x")
        golden = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        again = Image.open(io.BytesIO(made.data))
        assert made.suffix == suffix
        assert again.getexif().get(0x0112, 1) == 1
        assert (made.width, made.height) == golden.size == again.size
        assert np.abs(pixels(made.data) - np.asarray(golden).astype(int)).mean() < 2


def test_cmyk_and_webp_become_rgb_jpeg_close_to_pillows_conversion() -> None:
    for data in (
        saved(PHOTO.convert("CMYK"), "JPEG", quality=95),
        saved(PHOTO, "WEBP", quality=90),
    ):
        made = plain(data, "x")
        assert made.suffix == "jpg"
        assert Image.open(io.BytesIO(made.data)).mode == "RGB"
        assert np.abs(pixels(made.data) - pixels(data)).mean() < 2


def test_metadata_does_not_survive_reencoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a private remark"
    assert b"private" not in plain(saved(PHOTO, "JPEG", exif=exif, comment="private"), "x").data


JPEG, PNG = saved(PHOTO, "JPEG"), saved(PHOTO, "PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html><body>404 Not Found</body></html>",
        np.random.default_rng(0).bytes(5000),
        JPEG[: len(JPEG) // 2],
        JPEG[:-2],
        PNG[: len(PNG) // 2],
        PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=[
        "empty",
        "html",
        "random",
        "half a jpeg",
        "no end marker",
        "half a png",
        "flipped png",
        "postscript",
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name_in_one_line(data: bytes) -> None:
    with pytest.raises(DataError, match=r"n01/bad\.JPEG: not a readable image") as caught:
        plain(data, "n01/bad.JPEG")
    assert "\n" not in str(caught.value)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("side", [60_000, 9_000])
def test_a_bomb_is_refused_from_its_header(side: int) -> None:
    assert side * side > MAX_PIXELS
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"never looked at")
    with pytest.raises(DataError, match=r"bomb\.png: .*(limit|bomb)"):
        plain(bomb, "bomb.png")


def test_lossless_means_lossless() -> None:
    image = crop(3, 16, (32, 60))
    np.testing.assert_array_equal(pixels(encode_png(image).data), image)
