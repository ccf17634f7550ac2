"""What is said of an image before it is decoded, against Pillow's own reading of its header."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from tests.support.photos import crop
from tests.support.shards import encoded
from vssl_dist.data.store.header import find_header_problem


def problem_of(blob: bytes, height: int, width: int) -> str:
    return find_header_problem(np.frombuffer(blob, np.uint8), height, width)


def photograph(height: int, width: int) -> Image.Image:
    return Image.fromarray(crop(3, 4, (64, 64))).resize((width, height))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


SOUND = {
    "baseline": lambda p: saved(p, "JPEG"),
    "progressive": lambda p: saved(p, "JPEG", progressive=True),
    "grey": lambda p: saved(p.convert("L"), "JPEG"),
    "cmyk": lambda p: saved(p.convert("CMYK"), "JPEG"),
    "restart markers": lambda p: saved(p, "JPEG", restart_marker_blocks=1),
    "exif with a thumbnail": lambda p: saved(p, "JPEG", exif=b"Exif\0\0" + encoded(p, "JPEG")),
    "a colour profile of many segments": lambda p: saved(p, "JPEG", icc_profile=bytes(300_000)),
    "a remark": lambda p: saved(p, "JPEG", comment=b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01"),
    "png": lambda p: saved(p, "PNG"),
    "palette": lambda p: saved(p.convert("P"), "PNG"),
    "alpha": lambda p: saved(p.convert("RGBA"), "PNG"),
    "one bit": lambda p: saved(p.convert("1"), "PNG"),
}


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (65, 64)])
def test_a_sound_image_of_the_stated_size_passes_and_of_any_other_does_not(
    kind: str, size: tuple[int, int]
) -> None:
    blob = SOUND[kind](photograph(*size))
    assert Image.open(io.BytesIO(blob)).size == size[::-1]
    assert problem_of(blob, *size) == ""
    for height, width in ((size[0] + 1, size[1]), (size[0], size[1] + 1), (100, 100)):
        assert problem_of(blob, height, width).startswith(f"is {size[1]}x{size[0]} pixels where")


def test_what_pillow_skips_on_its_way_to_the_size_is_skipped() -> None:
    blob = SOUND["baseline"](photograph(20, 30))
    first = 4 + int.from_bytes(blob[4:6], "big")
    for between in (b"\xff" * 9, b"junk", b"\xff\x00more", b"\xff\xd0"):
        odd = blob[:first] + between + blob[first:]
        assert Image.open(io.BytesIO(odd)).size == (30, 20)
        assert problem_of(odd, 20, 30) == ""


def test_every_cut_of_a_header_is_a_reason_and_never_an_exception() -> None:
    for kind in ("baseline", "png"):
        blob = SOUND[kind](photograph(20, 30))
        whole = next(n for n in range(len(blob)) if problem_of(blob[:n], 20, 30) == "")
        assert whole < 700
        assert all(problem_of(blob[:n], 20, 30) for n in range(whole))


def test_sixteen_bits_are_a_reason() -> None:
    grey = np.asarray(photograph(20, 30).convert("L")).astype(np.uint16) * 257
    assert "has 16 bits" in problem_of(encoded(Image.fromarray(grey), "PNG"), 20, 30)


def test_noise_is_a_reason_at_once() -> None:
    noise = np.random.default_rng(0)
    hostile = [b"\xff\xd8" + bytes(2**26), b"\xff\xd8" + b"\xff" * 2**26, b"", b"\xff\xd8\xff"]
    hostile += [b"\xff\xd8" + noise.bytes(500) for _ in range(200)]
    start = time.perf_counter()
    assert all(problem_of(blob, 20, 30) for blob in hostile)
    assert time.perf_counter() - start < 2
