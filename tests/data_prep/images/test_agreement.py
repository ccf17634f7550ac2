"""One decode decides for plain files because both decoders agree on them; on others both decide."""

from __future__ import annotations

import io
import json
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data_prep import shard, verify
from data_prep.images.agreement import (
    SHOWN_DIFFERENTLY_REASON,
    UNREAD_BY_DALI_REASON,
    DecodeFunction,
    dali_decoder,
    find_decoder_disagreement,
)
from data_prep.images.examine import (
    DEFAULT_RULES,
    ImageRules,
    ImageVerdict,
    examine_image,
)
from data_prep.images.structure import inspect_structure
from tests.support.damage import alone, memory_left
from tests.support.encoders import SIGNATURE, chunk, png, rows, segment, vast_png
from tests.support.kinds import KEEP, KINDS, exif, within
from tests.support.photos import crop
from vssl_dist.data.bare import strip_metadata
from vssl_dist.data.store.manifest import read_manifest

PICTURE = crop(2, 16, (40, 56))
PLAIN = {
    kind: KEEP[kind](PICTURE)
    for kind in (
        "png plain", "png by pillow", "png grey", "png interlaced", "png idats of five bytes",
        "jpeg by pillow", "jpeg grey", "jpeg progressive", "jpeg own", "jpeg own grey",
        "jpeg own sampled", "jpeg own sampled down", "jpeg own restarts", "jpeg own adobe",
        "jpeg exif thumbnail", "jpeg xmp", "jpeg photoshop", "jpeg profile",
        "jpeg comments of 60 kB",
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def decode() -> DecodeFunction:
    decoder = dali_decoder()
    assert decoder is not None
    return decoder


def form(data: bytes) -> str:
    return "PNG" if data.startswith(SIGNATURE) else "JPEG"


def test_the_plain_class_is_what_it_is_said_to_be() -> None:
    for kind, data in PLAIN.items():
        assert inspect_structure(data, form(data)).is_plain, kind
    odd = ("png profile", "png checksum of a text", "png behind its end", "png too many pixels")
    odd += ("jpeg own rgb", "jpeg own rgb by name", "jpeg own sampled by four", "jpeg fill bytes")
    odd += ("jpeg exif of garbage", "jpeg behind its end", "jpeg own channels from 0")
    for kind in odd:
        data = KEEP[kind](PICTURE)
        assert not inspect_structure(data, form(data)).is_plain, kind


@pytest.mark.parametrize("kind", PLAIN)
def test_pillow_and_dali_agree_on_plain_files_whole_or_hurt(
    kind: str, decode: DecodeFunction
) -> None:
    rng, whole = random.Random(kind), PLAIN[kind]
    verdicts = []
    for number in range(60):
        data = hurt(rng, whole) if number else whole
        if (
            not data.startswith((SIGNATURE, b"\xff\xd8"))
            or not inspect_structure(data, form(data)).is_plain
        ):
            continue
        is_kept = examine_image(data, DEFAULT_RULES).verdict is ImageVerdict.KEEP
        verdicts.append(is_kept)
        picture = np.asarray(Image.open(io.BytesIO(strip_metadata(data)))) if is_kept else PICTURE
        disagreement = find_decoder_disagreement(data, picture, decode)
        assert disagreement == ("" if is_kept else UNREAD_BY_DALI_REASON)
    assert verdicts[0]


def hurt(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, in a PNG such that its checksums do not tell."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(2, len(changed))
        changed[at] ^= 1 << rng.randrange(8)
    if not data.startswith(SIGNATURE) or rng.random() < 0.3:
        return bytes(changed)
    png_chunks, at = [SIGNATURE], len(SIGNATURE)
    while at < len(changed):
        end = at + 12 + int.from_bytes(changed[at : at + 4], "big")
        if end > len(changed):
            return bytes(changed)
        png_chunks.append(chunk(bytes(changed[at + 4 : at + 8]), bytes(changed[at + 8 : end - 4])))
        at = end
    return b"".join(png_chunks)


def test_two_levels_of_difference_are_the_limit(decode: DecodeFunction) -> None:
    data = png(PICTURE // 2)
    for levels, disagreement in ((0, ""), (2, ""), (3, SHOWN_DIFFERENTLY_REASON)):
        assert (
            find_decoder_disagreement(data, PICTURE // 2 + np.uint8(levels), decode) == disagreement
        )
    assert find_decoder_disagreement(data, PICTURE[1:] // 2, decode) == SHOWN_DIFFERENTLY_REASON
    assert find_decoder_disagreement(png(PICTURE[..., 0]), PICTURE[..., 0], decode) == ""


def test_after_a_file_that_it_refuses_dali_decodes_the_next(decode: DecodeFunction) -> None:
    for _ in range(3):
        assert find_decoder_disagreement(b"no picture", PICTURE, decode) == UNREAD_BY_DALI_REASON
        assert find_decoder_disagreement(png(PICTURE), PICTURE, decode) == ""


def test_a_lack_of_memory_is_no_objection(decode: DecodeFunction) -> None:
    vast = vast_png(4000, 6000)
    black = np.broadcast_to(np.uint8(0), (4000, 6000, 3))
    with memory_left(100 << 20), pytest.raises(MemoryError):
        find_decoder_disagreement(vast, black, decode)
    assert find_decoder_disagreement(png(PICTURE), PICTURE, decode) == ""
    assert find_decoder_disagreement(vast, black, decode) == ""


def test_a_window_that_the_stream_outgrows_costs_a_png_its_form_only() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    body = zlib.compress(rows(np.concatenate([pixels, pixels])))
    narrow = bytes([0x08, 31 - 0x0800 % 31]) + body[2:]
    finding = examine_image(png(np.concatenate([pixels, pixels]), coded=narrow), DEFAULT_RULES)
    assert (finding.verdict, finding.reason) == (ImageVerdict.ENCODE_ANEW, UNREAD_BY_DALI_REASON)


def test_what_inflates_to_gigabytes_is_not_inflated() -> None:
    packer = zlib.compressobj()
    pixels = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    pixels += 300 * (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8_000_000)))
    directory = b"MM\0*\0\0\0\x08\xff\xff" + 65_535 * struct.pack(">HHII", 9, 7, 700_000, 8)
    bombs = {
        "pixels": (png(PICTURE, coded=pixels), ImageVerdict.ENCODE_ANEW),
        "texts": (png(PICTURE, before=100 * [text]), ImageVerdict.ENCODE_ANEW),
        "exif": (png(PICTURE, before=[chunk(b"eXIf", directory)]), ImageVerdict.KEEP),
        "segments": (
            within(*5_000 * [segment(0xE1, b"Exif\0\0" + exif(1))])(PICTURE),
            ImageVerdict.KEEP,
        ),
    }
    for name, (bomb, due) in bombs.items():
        examine_image(png(PICTURE, before=[chunk(b"tEXt", b"a\0b")]), DEFAULT_RULES)
        before, start = psutil.Process().memory_info().rss, time.process_time()
        assert examine_image(bomb, ImageRules(salvage=True)).verdict is due, name
        assert time.process_time() - start < 1, name
        assert psutil.Process().memory_info().rss - before < 100e6, name


def folder(root: Path, *kinds: str) -> Path:
    for number, kind in enumerate(kinds):
        path = root / "raw" / "c" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(KINDS[kind](crop(number, 16, (24, 40))))
    return root / "raw"


def test_libraries_are_loaded_only_for_files_that_need_them_and_say_nothing(
    tmp_path: Path,
) -> None:
    plain = folder(tmp_path / "plain", "png plain", "jpeg by pillow", "jpeg profile")
    other = folder(
        tmp_path / "other", "png grey profile", "jpeg own rgb", "png private part of 9 MB"
    )
    done = alone(
        f"""
import sys
from data_prep import shard
assert "torch" not in sys.modules  # which comes with the writer of shards
for root, out, loaded in (({str(plain)!r}, "a", False), ({str(other)!r}, "b", True)):
    call = ["imagefolder", "--root", root, "--out", {str(tmp_path)!r} + "/" + out]
    assert shard.main([*call, "--workers", "1"]) == 0
    assert ("nvidia.dali" in sys.modules) == loaded
import os
from data_prep.images.examine import DEFAULT_RULES, ImageVerdict, examine_image
os.close(2)
data = open({str(other)!r} + "/c/0.jpg", "rb").read()
sys.exit(examine_image(data, DEFAULT_RULES).verdict != ImageVerdict.KEEP)
"""
    )
    assert (done.returncode, "" if done.returncode else done.stdout.count("written in")) == (0, 2)
    assert not [line for line in done.stderr.splitlines() if line.strip() and "━" not in line]


def test_workers_ask_both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, *280 * ["png grey profile"], "png stream never ended")
    call = ["imagefolder", "--root", str(root), "--out", str(tmp_path / "o"), "--workers", "2"]
    assert shard.main([*call, "--on-bad", "skip"]) == 0
    captured = capfd.readouterr()
    assert "1 rejected" in captured.out
    assert "libpng" not in captured.err


def test_without_dali_the_manifest_says_who_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, "png profile", "png private part of 9 MB", "png plain")
    call = ["imagefolder", "--root", str(root), "--workers", "1", "--out"]
    program = f"""
import sys
sys.modules["nvidia"] = None
from data_prep import shard, verify
assert shard.main({call} + [{str(tmp_path / "o")!r}]) == 0
assert verify.main([{str(tmp_path / "o")!r}, "--workers", "1"]) == 0
"""
    done = alone(program)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "o" / "train")
    assert manifest.source["judged_by"] == "Pillow alone"
    assert manifest.samples == 3
    assert shard.main([*call, str(tmp_path / "o")]) == 0
    assert "complete already" in capsys.readouterr().out
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 1
    assert "Pillow decodes it and DALI does not" in capsys.readouterr().out
    assert shard.main([*call, str(tmp_path / "with")]) == 0
    assert "judged_by" not in read_manifest(tmp_path / "with" / "train").source
    (line,) = (tmp_path / "with" / "train" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["decision"] == "normalised"
    assert verify.main([str(tmp_path / "with"), "--workers", "1"]) == 0
