"""Samples, rejects and what is left out are together all that is there, whatever is there."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_prep import shard
from tests.support.archives import jpeg, packed
from vssl_dist.data.store.manifest import read_manifest

Files = list[tuple[str | tarfile.TarInfo, bytes]]
LATIN = os.fsdecode(b"\xe9\xff")
"""A name that is no UTF-8."""


def encoded(kind: str, number: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(stream, kind)
    return stream.getvalue()


def run(capsys: pytest.CaptureFixture[str], source: str, root: Path, out: Path) -> list[str]:
    """The closing lines."""
    arguments = ["--root", str(root), "--out", str(out), "--workers", "1", "--on-bad", "skip"]
    assert shard.main([source, *arguments]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if ": " in line]


def records(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text("ascii").splitlines()]


def told(line: str) -> tuple[int, int, int, int]:
    """Of a closing line: samples, rejects, what is left out, and files in folders of these."""
    samples = int(re.search(r": ([0-9]+) samples", line)[1])  # type: ignore[index]
    rejected = re.search(r"([0-9]+) rejected", line)
    left_out = re.search(r"; left out: ([^;]*)", line)
    counts = re.findall(r"([0-9]+) [^,]+", left_out[1]) if left_out else []
    within = re.search(r" \(([0-9]+) files? in folders\)", line)
    return (
        samples,
        int(rejected[1]) if rejected else 0,
        sum(map(int, counts)),
        int(within[1]) if within else 0,
    )


def below(folder: Path) -> int:
    """How many files there are in a folder."""
    return sum(len(files) for _, _, files in os.walk(folder))


PICTURES: tuple[Callable[[int], bytes], ...] = (
    jpeg,
    jpeg,
    lambda number: encoded("PNG", number),
    lambda number: encoded("BMP", number),
    lambda number: encoded("AVIF", number),
    lambda number: jpeg(number)[:500],
    lambda number: b"",
    lambda number: b"words",
    lambda number: b"\xff\xd8\xff",
)
NAMES = (
    "%d.jpg", "%d.JPEG", "%d", "%d.dat", "%d.png.1", ".%d", "._%d.jpg", "%d.txt", "x %d.", "%d.tga",
    f"{LATIN}%d", f"%d.{LATIN}", "é%d.avif", "%d.\N{PILE OF POO}",
)  # fmt: skip
FOLDERS = ("", "deep/", "deep/er/", ".hidden/", "__MACOSX/", "a b./", f"{LATIN}/")


def grow(top: Path, dice: random.Random, classes: tuple[str, ...], first: int) -> None:
    """Files of every kind, in and beside classes that have a picture at least."""
    (top / ".cache" / "deep").mkdir(parents=True)
    (top / ".cache" / "deep" / "x.jpg").write_bytes(b"")
    for number in range(first, first + 40):
        image_folder = top / dice.choice(("", *classes)) / dice.choice(FOLDERS)
        image_folder.mkdir(parents=True, exist_ok=True)
        (image_folder / (dice.choice(NAMES) % number)).write_bytes(dice.choice(PICTURES)(number))
    for number, name in enumerate(classes, first + 40):
        (top / name).mkdir(exist_ok=True)
        (top / name / "sure.jpg").write_bytes(jpeg(number))
    (top / classes[0] / "gone").symlink_to("nowhere")
    os.mkfifo(top / classes[0] / f"pipe{dice.choice(('', '.jpg'))}")


@pytest.mark.parametrize("seed", range(6))
def test_every_file_of_a_tree_is_a_sample_a_reject_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    dice = random.Random(seed)
    # A folder of pictures beside the classes is one more, so these are as many as can be.
    classes = ("cat", "dog", "deep", "__MACOSX", "a b.", LATIN)
    split_folders = {"train": dice.choice(("train", "Train")), "val": dice.choice(("dev", "VALID"))}
    for at, name in enumerate(split_folders.values()):
        grow(tmp_path / "raw" / name, dice, classes, 1000 * seed + 100 * at)
    (tmp_path / "raw" / "notes.md").write_text("")
    (tmp_path / "raw" / "more" / "below").mkdir(parents=True)
    for name in ("1.jpg", "below/2.txt"):
        (tmp_path / "raw" / "more" / name).write_bytes(jpeg(5))
    lines = run(capsys, "imagefolder", tmp_path / "raw", tmp_path / "o")
    for line, split in zip(lines, ("train", "val"), strict=True):
        folder, top = tmp_path / "o" / split, tmp_path / "raw" / split_folders[split]
        samples, rejected, left_out, within = told(line)
        lines_of = records(folder)
        assert samples == read_manifest(folder).samples
        assert rejected == sum(record["decision"] == "rejected" for record in lines_of)
        left_out_records = [
            record["file"] for record in lines_of if record["decision"] == "left out"
        ]
        assert left_out == len(left_out_records) == len(set(left_out_records))
        folders = [name for name in left_out_records if name.endswith("/")]
        assert within == sum(below(top / name) for name in folders) > 0
        there = below(top) + (split == "train") * 3  # and what lies beside the splits
        assert samples + rejected + left_out - len(folders) + within == there


def link(name: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "0.jpg"
    return member, b""


def some(dice: random.Random, first: int) -> Files:
    """Members of an archive: each sample, sound or not, has an image and a label."""
    files: Files = [(f"{first}.jpg", jpeg(first)), (f"{first}.cls", b"1")]
    for number in range(first + 1, first + 20):
        key = dice.choice(("%d", "./%d", "a b/%d", "d.r/%d", "é%d", f"{LATIN}%d")) % number
        field = dice.choice(("jpg", "JPG", "png", "jpeg"))
        label = dice.choice((b"1", b" 2.0\n", b"\xef\xbb\xbf007", b"1e3", b"", b"3.5"))
        extras: Files = [
            (f"{key}.txt", b"words"),
            (f"{key}.seg.png", encoded("PNG", 9)),
            (f"{key}.json", b"{"),
        ]
        alone: Files = [(f"d.r/LICENSE{number}", b"words"), (f"a/._{number}.jpg", b"x")]
        alone += [link(f"link{number}", dice.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)))]
        files += [(f"{key}.{field}", dice.choice(PICTURES)(number)), (f"{key}.cls", label)]
        files += dice.sample(extras, dice.randrange(3)) + dice.sample(alone, dice.randrange(3))
    return files


@pytest.mark.parametrize("seed", range(6))
def test_every_member_of_archives_is_part_of_a_sample_a_reject_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    dice = random.Random(seed)
    root = tmp_path / "raw"
    root.mkdir()
    there = 1
    (root / "index.json").write_text("{}")
    for name in ("a.tar", f"{LATIN}.TAR", "c.tar.gz", "d.tgz"):
        ends, blobs = (b"", bytes(512), bytes(51200)), []
        for piece in range(dice.randrange(1, 4)):
            files = some(dice, 10_000 * seed + 1000 * len(list(root.iterdir())) + 100 * piece)
            there += len(files)
            form = dice.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
            blobs.append(packed(files, form) + dice.choice(ends))
        if name.endswith("gz"):
            blobs = [gzip.compress(blob) for blob in blobs]
        (root / name).write_bytes(b"".join(blobs))
    (line,) = run(capsys, "webdataset", root, tmp_path / "o")
    samples, rejected, left_out, _ = told(line)
    assert samples == read_manifest(tmp_path / "o" / "train").samples
    assert 2 * (samples + rejected) + left_out == there
    lines_of = records(tmp_path / "o" / "train")
    assert rejected == sum(record["decision"] == "rejected" for record in lines_of)
    left_out_records = [record for record in lines_of if record["decision"] == "left out"]
    numbers = [re.match(r"([0-9]+) in samples,", record["reason"]) for record in left_out_records]
    assert sum(int(number[1]) if number else 1 for number in numbers) == left_out
