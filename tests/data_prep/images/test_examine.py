"""What happens to an image file on its way into a shard, against Pillow's own conversions."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps

from data_prep.images.agreement import dali_decoder
from data_prep.images.examine import (
    DEFAULT_RULES,
    MAX_PIXELS,
    MAX_STORED_SIDE,
    ImageRules,
    ImageVerdict,
    encode_png,
    examine_image,
)
from tests.support.damage import alone
from tests.support.kinds import exif
from tests.support.photos import crop
from tests.support.sharding import stored

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
    encoded = stored(data)
    assert (encoded.data, encoded.suffix) == (data, suffix)
    assert (encoded.width, encoded.height) == image.size


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
    encoded = stored(data)
    assert encoded.suffix == "png"
    assert stored(encoded.data).data == encoded.data
    np.testing.assert_array_equal(pixels(encoded.data), np.asarray(golden.convert("RGB")))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png")):
        data = saved(PHOTO, kind, exif=exif)
        encoded = stored(data)
        golden = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        again = Image.open(io.BytesIO(encoded.data))
        assert encoded.suffix == suffix
        assert again.getexif().get(0x0112, 1) == 1
        assert (encoded.width, encoded.height) == golden.size == again.size
        assert np.abs(pixels(encoded.data) - np.asarray(golden).astype(int)).mean() < 2


def test_cmyk_and_webp_become_rgb_jpeg_close_to_pillows_conversion() -> None:
    for data in (
        saved(PHOTO.convert("CMYK"), "JPEG", quality=95),
        saved(PHOTO, "WEBP", quality=90),
    ):
        encoded = stored(data)
        assert encoded.suffix == "jpg"
        assert Image.open(io.BytesIO(encoded.data)).mode == "RGB"
        assert np.abs(pixels(encoded.data) - pixels(data)).mean() < 2


def test_metadata_does_not_survive_reencoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a private remark"
    assert b"private" not in stored(saved(PHOTO, "JPEG", exif=exif, comment="private")).data


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
def test_a_damaged_or_foreign_file_is_refused_in_one_line(data: bytes) -> None:
    finding = examine_image(data, DEFAULT_RULES)
    assert finding.verdict is ImageVerdict.REJECT
    assert finding.reason.startswith("not a readable image")
    assert "\n" not in finding.reason


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("side", [60_000, 9_000])
def test_a_bomb_is_refused_from_its_header(side: int) -> None:
    assert side * side > MAX_PIXELS
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"never looked at")
    finding = examine_image(bomb, DEFAULT_RULES)
    assert finding.verdict is ImageVerdict.REJECT
    assert re.search("limit|bomb", finding.reason)


@pytest.mark.parametrize("side", [(1, 1), (32, 32), (150, 97)])
def test_a_small_png_is_pillows_own_byte_for_byte(side: tuple[int, int]) -> None:
    for image in (PHOTO.resize(side), PHOTO.convert("L").resize(side)):
        encoded = encode_png(np.asarray(image))
        assert encoded.data == saved(image, "PNG")
        assert (encoded.width, encoded.height) == side


def test_lossless_means_lossless() -> None:
    image = crop(3, 16, (32, 60))
    np.testing.assert_array_equal(pixels(encode_png(image).data), image)


def test_a_ycck_jpeg_becomes_rgb() -> None:
    # Pillow writes CMYK only; the marker of Adobe says that the same four planes are YCCK.
    data = saved(PHOTO.convert("CMYK"), "JPEG", quality=95)
    position = data.index(b"Adobe") + 11
    ycck = data[:position] + b"\x02" + data[position + 1 :]
    assert data[position] == 0
    encoded = stored(ycck)
    golden = Image.open(io.BytesIO(ycck))
    assert golden.mode == "CMYK"
    assert np.abs(pixels(encoded.data) - np.asarray(golden.convert("RGB")).astype(int)).mean() < 2


def test_a_png_that_is_called_jpeg_is_stored_as_what_it_is() -> None:
    encoded = stored(saved(PHOTO, "PNG"))
    assert (encoded.suffix, encoded.data) == ("png", saved(PHOTO, "PNG"))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_of_any_shape_are_kept(size: tuple[int, int], kind: str) -> None:
    data = saved(PHOTO.resize(size), kind)
    encoded = stored(data)
    assert (encoded.data, encoded.width, encoded.height) == (data, *size)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"L": True}])
def test_a_jpeg_passes_exactly_when_pillow_decodes_all_of_it(options: dict[str, Any]) -> None:
    image = PHOTO.convert("L") if options.pop("L", False) else PHOTO
    data = saved(image, "JPEG", **options)
    random = np.random.default_rng(0)
    hurt = [data[:cut] for cut in random.integers(0, len(data), 30)]
    for position in random.integers(0, len(data), 90).tolist():
        hurt += [
            data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
        ]
    passed = [
        examine_image(blob, DEFAULT_RULES).verdict is not ImageVerdict.REJECT for blob in hurt
    ]
    assert passed == [decodes(blob) for blob in hurt]
    assert 0 < sum(passed) < len(passed)


def decodes(blob: bytes) -> bool:
    try:
        Image.open(io.BytesIO(blob)).load()
    except Exception:
        return False
    return True


def test_what_is_wrong_is_said_in_the_same_words_every_time() -> None:
    for data in (b"", b"<html>", JPEG[:-2], PNG[: len(PNG) // 2]):
        reason = examine_image(data, DEFAULT_RULES).reason
        assert reason.startswith("not a readable image (")
        assert "0x" not in reason
        assert examine_image(data, DEFAULT_RULES).reason == reason


def png_bomb() -> bytes:
    """12,000 x 12,000 pixels of one bit: a whole and valid file of 18 kilobytes."""
    body = zlib.compress(bytes((1 + 1500) * 12_000))
    head = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    position = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:position] + struct.pack(">HH", 60_000, 60_000) + JPEG[position + 4 :]


@pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb])
@pytest.mark.parametrize("salvage", [False, True])
def test_a_bomb_costs_neither_time_nor_memory(bomb: Callable[[], bytes], salvage: bool) -> None:
    data = bomb()
    examine_image(data, DEFAULT_RULES)
    before = psutil.Process().memory_info().rss
    start = time.process_time()
    examined = examine_image(data, ImageRules(salvage=salvage))
    assert time.process_time() - start < 0.05
    assert psutil.Process().memory_info().rss - before < 50e6
    assert examined.verdict is ImageVerdict.REJECT
    assert f"more than the limit of {MAX_PIXELS}" in examined.reason


def test_salvage_keeps_the_part_that_is_there_and_never_an_empty_picture() -> None:
    head = JPEG.index(b"\xff\xda") + 14
    assert examine_image(JPEG[:head], ImageRules(salvage=True)).verdict is ImageVerdict.REJECT
    examined = examine_image(JPEG[: len(JPEG) * 2 // 3], ImageRules(salvage=True))
    assert examined.verdict is ImageVerdict.SALVAGE
    assert examined.reason.startswith("not a readable image")
    encoded = stored(JPEG[: len(JPEG) * 2 // 3], ImageRules(salvage=True))
    assert np.abs(pixels(encoded.data)[:24] - pixels(JPEG)[:24]).mean() < 2
    with pytest.raises(OSError, match="truncated"):  # and Pillow is as strict as before
        Image.open(io.BytesIO(JPEG[: len(JPEG) // 2])).load()


@pytest.mark.parametrize("short", [60, 100, 122, 500])
def test_shrinking_agrees_with_pillow_and_never_enlarges(short: int) -> None:
    encoded = stored(PNG, ImageRules(resize_short=short))
    assert PHOTO.size == (122, 133)
    side = (short, round(133 * short / 122)) if short < 122 else PHOTO.size
    golden = PHOTO.resize(side, Image.Resampling.LANCZOS) if short < 122 else PHOTO
    np.testing.assert_array_equal(pixels(encoded.data), np.asarray(golden))
    assert (encoded.data == PNG) == (short >= 122)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("turned", [False, True])
def test_no_side_is_longer_than_decoders_take(kind: str, turned: bool) -> None:
    for side, beyond in ((MAX_STORED_SIDE, False), (MAX_STORED_SIDE + 1, True)):
        stream = io.BytesIO()
        Image.new("L", (1, side) if turned else (side, 1)).save(stream, kind)
        examined = examine_image(stream.getvalue(), DEFAULT_RULES)
        assert (examined.verdict is ImageVerdict.REJECT) == beyond
        assert ("no side may have more than" in examined.reason) == beyond
        if not beyond:
            decode = dali_decoder()
            assert decode is not None
            encoded = stored(stream.getvalue())
            assert decode(encoded.data).shape == (encoded.height, encoded.width, 3)
    small = ImageRules(resize_short=8)
    stream = io.BytesIO()
    Image.new("L", (16, MAX_STORED_SIDE + 16)).save(stream, kind)
    assert examine_image(stream.getvalue(), DEFAULT_RULES).verdict is ImageVerdict.REJECT
    assert examine_image(stream.getvalue(), small).verdict is ImageVerdict.ENCODE_ANEW


def vast(kind: str, **options: Any) -> bytes:
    """A large picture in few bytes."""
    stream = io.BytesIO()
    Image.new("RGB", (6000, 4000), "green").save(stream, kind, **options)
    return stream.getvalue()


def test_a_lack_of_memory_is_no_verdict(tmp_path: Path) -> None:
    folder, out = tmp_path / "raw" / "c", tmp_path / "o"
    folder.mkdir(parents=True)
    progressive = vast("JPEG", progressive=True)
    turned = vast("JPEG", exif=b"Exif\0\0" + exif(6))
    large = {"plain": progressive, "for both": progressive + b"!", "turned": turned}
    for name, data in large.items():
        (folder / f"{name}.jpg").write_bytes(data)
    call = ["imagefolder", "--root", str(folder.parent), "--out", str(out), "--workers", "1"]
    done = alone(
        f"""
import resource, sys, psutil
from pathlib import Path
from data_prep import shard
from data_prep.images.examine import DEFAULT_RULES, ImageRules, examine_image
most = psutil.Process().memory_info().vms + (40 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in Path({str(folder)!r}).iterdir():
    for rules in (DEFAULT_RULES, ImageRules(salvage=True)):
        try:
            print(path, examine_image(path.read_bytes(), rules))
        except MemoryError:
            pass
sys.exit(shard.main({call} + ["--on-bad", "skip"]))
"""
    )
    assert (done.returncode, done.stdout) == (2, "")
    *bars, line = (line for line in done.stderr.splitlines() if line.strip())
    assert line.startswith(f"error: {out}: memory ran out")
    assert not [bar for bar in bars if "rror" in bar]
    assert not list(out.glob("*/rejects.jsonl"))
    assert examine_image(progressive, DEFAULT_RULES).verdict is ImageVerdict.KEEP
