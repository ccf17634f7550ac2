"""The picture alone: the same pixels, nothing that only tells about them, and never an error."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from tests.support.kinds import KEEP, KINDS
from tests.support.photos import crop
from vssl_dist.data.backends.reference import decode
from vssl_dist.data.bare import (
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    iter_jpeg_segments,
    iter_png_chunks,
    strip_metadata,
)

PICTURE = crop(5, 16, (30, 44))
TOLD = {"exif", "icc_profile", "comment", "xmp", "photoshop", "gamma", "srgb", "chromaticity",
        "XML:com.adobe.xmp", "Comment", "Software", "mp"}  # fmt: skip


@pytest.mark.parametrize("kind", KEEP)
def test_pillow_shows_the_picture_alone_and_learns_nothing_else(kind: str) -> None:
    image = Image.open(io.BytesIO(strip_metadata(KEEP[kind](PICTURE))))
    pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == PICTURE.shape
    assert not TOLD & set(image.info)
    assert image.getexif().get(0x0112) is None


def test_a_file_of_nothing_but_a_picture_is_not_copied() -> None:
    for kind in ("png plain", "png by pillow", "jpeg own", "jpeg by pillow"):
        data = KEEP[kind](PICTURE)
        assert strip_metadata(data) is data
    gif = KINDS["gif"](PICTURE)
    assert strip_metadata(gif) is gif


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "9 MB" not in kind])
def test_no_cut_and_no_noise_raises_and_only_damage_does_not_decode(kind: str) -> None:
    data = KINDS[kind](PICTURE)
    random = np.random.default_rng(0)
    for cut in random.integers(0, len(data), 20).tolist():
        for hurt in (data[:cut], data[:cut] + random.bytes(9) + data[cut:]):
            assert isinstance(strip_metadata(hurt), bytes)
    if kind in KEEP:
        assert decode(np.frombuffer(data, np.uint8)).size == PICTURE.shape[1::-1]


def test_a_file_of_countless_parts_takes_no_time() -> None:
    start = time.process_time()
    for hostile in (
        JPEG_SIGNATURE + 5_000_000 * b"\xff\xe1\0\2",
        JPEG_SIGNATURE + 20_000_000 * b"\xff",
        PNG_SIGNATURE + 2_000_000 * (b"\0\0\0\0prVt" + bytes(4)),
    ):
        assert len(strip_metadata(hostile)) <= len(hostile)
    assert time.process_time() - start < 2


def test_parts_are_walked_over_to_the_end_and_not_beyond() -> None:
    png, jpeg = (KEEP[kind](PICTURE) for kind in ("png by pillow", "jpeg by pillow"))
    for data, walk, last in ((png, iter_png_chunks, b"IEND"), (jpeg, iter_jpeg_segments, 0xD9)):
        sections = list(walk(data + data))
        assert sections[-1][0] == last
        assert sections[-1].end == len(data)
        assert [section[0] for section in sections].count(last) == 1
