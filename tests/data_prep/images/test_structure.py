"""The build of a JPEG or PNG: what Pillow forgives and a training would pay for is found."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.images.examine import (
    DEFAULT_RULES,
    ImageRules,
    ImageVerdict,
    examine_image,
)
from data_prep.images.structure import inspect_structure
from tests.support.photos import crop
from tests.support.sharding import stored

PHOTO = Image.fromarray(crop(0, 16, (90, 140)))
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: bytes, head: bytes, *between: bytes) -> bytes:
    png_chunks = [chunk(b"IHDR", head), *between, chunk(b"IDAT", zlib.compress(pixels))]
    return SIGNATURE + b"".join(png_chunks) + chunk(b"IEND", b"")


def interlaced(image: np.ndarray) -> bytes:
    """Adam7, pass by pass, each row without a filter."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
              (1, 0, 2, 1)]  # fmt: skip
    rows = [
        b"\0" + row.tobytes()
        for top, left, down, across in passes
        for row in image[top::down, left::across]
        if row.size
    ]
    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 1)
    return png(b"".join(rows), head)


JPEG, PNG = saved(PHOTO, "JPEG"), saved(PHOTO, "PNG")


@pytest.mark.parametrize("cut", range(1, 23))
def test_a_png_without_its_end_is_refused_wherever_it_was_cut(cut: int) -> None:
    finding = examine_image(PNG[:-cut], DEFAULT_RULES)
    assert finding.verdict is ImageVerdict.REJECT
    assert finding.reason.startswith("not a readable image (")


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (140, 90)])
def test_an_interlaced_png_has_all_its_pixels_or_is_refused(size: tuple[int, int]) -> None:
    image = np.asarray(PHOTO.resize(size))
    data = interlaced(image)
    assert (np.asarray(Image.open(io.BytesIO(data))) == image).all()
    assert stored(data).data == data
    whole = zlib.decompress(data[data.index(b"IDAT") + 4 :])
    head = data[16:29]
    assert "bytes of pixels are there" in examine_image(png(whole[:-1], head), DEFAULT_RULES).reason


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png_is_known_by_its_size(mode: str) -> None:
    image = Image.fromarray(np.full((5, 13), 999, np.uint16)) if mode == "I;16" else (
        PHOTO.resize((13, 5)).convert(mode)
    )  # fmt: skip
    data = saved(image, "PNG")
    assert inspect_structure(data, "PNG")[:2] == ("", "")
    at = data.index(b"IDAT")
    whole = zlib.decompress(data[at + 4 :])
    ahead = data[: at - 4]
    less = ahead + chunk(b"IDAT", zlib.compress(whole[:-1])) + chunk(b"IEND", b"")
    assert f"{len(whole) - 1} of {len(whole)} bytes" in inspect_structure(less, "PNG").damage


def test_a_png_that_is_damaged_but_decodes_is_refused_or_salvaged() -> None:
    head = struct.pack(">IIBBBBB", *PHOTO.size, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(PHOTO))
    at = PNG.index(b"IEND") - 8
    hurt = {
        "bytes of pixels": png(rows[: len(rows) * 2 // 3], head),
        "checksum of its IDAT": PNG[:at] + bytes([PNG[at] ^ 1]) + PNG[at + 1 :],
        "no decoder knows": png(rows, head, chunk(b"ABCD", b"?")),
    }
    for reason, data in hurt.items():
        finding = examine_image(data, DEFAULT_RULES)
        assert finding.verdict is ImageVerdict.REJECT
        assert reason in finding.reason
        assert examine_image(data, ImageRules(salvage=True)).verdict is ImageVerdict.SALVAGE
    assert stored(png(rows, head, chunk(b"abCd", b"whatever"))).suffix == "png"


def test_bytes_between_a_jpegs_segments_cost_it_its_form_and_not_its_picture() -> None:
    at = JPEG.index(b"\xff\xdb")
    stray = JPEG[:at] + b"\0\0\0" + JPEG[at:]
    finding = examine_image(stray, DEFAULT_RULES)
    assert (finding.verdict, finding.reason) == (
        ImageVerdict.ENCODE_ANEW,
        "JPEG with bytes between its segments",
    )
    decoded = np.asarray(Image.open(io.BytesIO(stored(stray).data))).astype(int)
    assert np.abs(decoded - np.asarray(Image.open(io.BytesIO(JPEG)))).mean() < 2
    padded = JPEG[:at] + b"\xff\xff" + JPEG[at:] + b"trailing"
    assert stored(padded).data == padded


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 1}, {}])
def test_any_jpeg_of_an_encoder_is_in_order(options: dict[str, Any]) -> None:
    for image in (PHOTO, PHOTO.convert("L"), PHOTO.convert("CMYK")):
        assert inspect_structure(saved(image, "JPEG", **options), "JPEG")[:3] == ("", "", "")


def test_a_jpeg_of_countless_scans_is_refused_before_they_are_decoded() -> None:
    data = saved(PHOTO.resize((2000, 1500)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + 3000 * data[last:-2] + data[-2:]
    start = time.process_time()
    finding = examine_image(bomb, ImageRules(salvage=True))
    assert time.process_time() - start < 1
    assert finding.verdict is ImageVerdict.REJECT
    assert "more than 100 scans" in finding.reason


def test_a_file_that_ends_in_erased_flash_is_walked_over_in_no_time() -> None:
    erased = JPEG[: len(JPEG) // 2] + 20_000_000 * b"\xff"
    start = time.process_time()
    assert inspect_structure(erased, "JPEG") == ("", "", "", False)
    assert time.process_time() - start < 5  # and not as many hours
    frame = b"\xff\xc0\xff\xff\x08\0\x01\0\x01\xff" + 21_842 * b"\1\x11\0" + b"\0"
    start = time.process_time()
    inspect_structure(
        JPEG[:2] + frame + JPEG[2:], "JPEG"
    )  # as many channels as a segment can state
    assert time.process_time() - start < 5


def test_channels_of_a_fraction_that_no_decoder_takes_are_refused() -> None:
    at = JPEG.index(b"\xff\xc0") + 11
    for luma, chroma, fine in ((0x31, 0x21, False), (0x22, 0x11, True), (0x41, 0x11, True)):
        factors = bytes([luma]), bytes([chroma]), bytes([chroma])
        data = bytearray(saved(PHOTO, "JPEG", subsampling=0))
        for channel, factor in enumerate(factors):
            data[at + 3 * channel : at + 3 * channel + 1] = factor
        assert ("steps" not in inspect_structure(bytes(data), "JPEG").damage) is fine
