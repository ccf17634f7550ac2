"""Verification finds every kind of damage, and nothing in a dataset that is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import shard, verify
from data_prep.sharding import dataset as dataset_builder
from tests.support.photos import crop, tiny_dataset
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import (
    Manifest,
    _parse_manifest,
    read_manifest,
    seal,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    tiny_dataset(out, samples=24, shard_size=8, suffix="jpg", sides=(32, 48))
    tiny_dataset(out, samples=6, shard_size=8, split="val")
    return out


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "o"))


def findings(out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What verify complains about; checks that the exit code agrees."""
    code = verify.main([str(out), "--workers", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
    assert code == (1 if lines else 0)
    return lines


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_whole_dataset_passes(
    written: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    for folder, count in ((written, 2), (written / "train", 1)):
        assert verify.main([str(folder), "--workers", workers]) == 0
        assert capsys.readouterr().out.count("are intact") == count


def test_a_cut_anywhere_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = out / "train" / "shard-000001.tar"
    blob = path.read_bytes()
    row = np.load(path.with_name("shard-000001.idx.npy"))[3]
    image = int(row["offset"])
    cuts = [0, 300, 512, image - 512, image + 5, image + int(row["size"]), len(blob) - 512]
    for cut in [*cuts, len(blob) - 1]:
        path.write_bytes(blob[:cut])
        problems = findings(out, capsys)
        assert any(f"has {cut} bytes instead of {len(blob)}" in line for line in problems)
    path.write_bytes(blob + b"\0" * 512)
    assert len(findings(out, capsys)) == 1


def test_every_flipped_bit_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for path in sorted(out.rglob("*.*")):
        blob = path.read_bytes()
        for position in [0, *random.integers(len(blob), size=6).tolist(), len(blob) - 1]:
            path.write_bytes(
                blob[:position]
                + bytes([blob[position] ^ (1 << position % 8)])
                + blob[position + 1 :]
            )
            assert findings(out, capsys), f"byte {position} of {path.name}"
        path.write_bytes(blob)
    assert findings(out, capsys) == []


def test_a_flip_inside_an_image_names_the_sample(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / "train" / "shard-000002.tar"
    row = np.load(path.with_name("shard-000002.idx.npy"))[5]
    with path.open("r+b") as file:
        file.seek(int(row["offset"]) + 40)
        file.write(b"\x00\x01\x02")
    problems = findings(out, capsys)
    assert any("shard-000002.tar: sample 21: crc32 differs" in line for line in problems)
    assert any("shard-000002.tar: sha256 is not" in line for line in problems)


def missing_tar(folder: Path) -> None:
    (folder / "shard-000000.tar").unlink()


def missing_index(folder: Path) -> None:
    (folder / "shard-000002.idx.npy").unlink()


def missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def extra_shard(folder: Path) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000003.tar")


def swapped_shards(folder: Path) -> None:
    (folder / "shard-000000.tar").rename(folder / "x")
    (folder / "shard-000001.tar").rename(folder / "shard-000000.tar")
    (folder / "x").rename(folder / "shard-000001.tar")


def empty_tar(folder: Path) -> None:
    (folder / "shard-000001.tar").write_bytes(b"")


def unfinished(folder: Path) -> None:
    (folder / ".sharding").mkdir()


@pytest.mark.parametrize(
    "harm",
    [
        missing_tar,
        missing_index,
        missing_manifest,
        extra_shard,
        swapped_shards,
        empty_tar,
        unfinished,
    ],
)
def test_missing_extra_and_swapped_files_are_found(
    out: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    harm(out / "train")
    assert findings(out, capsys)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(samples=25),
        lambda m: m.update(samples=25) or m["shards"][0].update(samples=9),
        lambda m: m["shards"][0].update(samples=7) or m["shards"][1].update(samples=9),
        lambda m: m["shards"][0].update(bytes=10240),
        lambda m: m["shards"].pop() and m.update(samples=16),
        lambda m: m["shards"].reverse(),
        lambda m: m["classes"].pop(),
        lambda m: m.update(shards=[]),
    ],
    ids=["total", "one", "moved", "bytes", "dropped", "reversed", "classes", "none"],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_edited_manifests_are_found_even_with_a_fresh_seal(
    out: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict], object], sealed: bool
) -> None:
    path = out / "train" / "manifest.json"
    contents = json.loads(path.read_bytes())
    edit(contents)
    path.write_bytes(seal(contents) if sealed else json.dumps(contents).encode())
    assert findings(out, capsys)


def write_images(folder: Path, each: int = 3, first: int = 0) -> None:
    for number in range(2 * each):
        path = folder / f"n{number % 2:02d}" / f"{number // 2}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop(first + number, 4, (32, 60))).save(path, "JPEG")


def forge(out: Path, **changes: int) -> None:
    """Change row 2 of shard 1's index and seal the lie with all checksums right."""
    folder = out / "train"
    path = folder / "shard-000001.idx.npy"
    rows = np.load(path)
    for name, by in changes.items():
        rows[name][2] = int(rows[name][2]) + by
    np.save(path, rows)
    contents = json.loads((folder / "manifest.json").read_bytes())
    contents["shards"][1]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_bytes(seal(contents))
    Dataset.open(folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"label": 1}, "tar and index disagree"),
        ({"label": 40}, "label 42 is not a class"),
        ({"height": 1}, "not a plain image of"),
        ({"crc32": 1}, "crc32 differs"),
        ({"size": -1}, "crc32 differs"),
        ({"offset": 512}, "crc32 differs"),
    ],
)
def test_an_index_that_contradicts_its_tar_is_found_though_every_checksum_holds(
    out: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int], complaint: str
) -> None:
    forge(out, **changes)
    problems = findings(out, capsys)
    assert len(problems) == 1
    assert "sample 10: " in problems[0]
    assert complaint in problems[0]


def test_nothing_to_verify_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "none", tmp_path):
        assert verify.main([str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {folder}: no ")


def test_every_single_bit_of_a_manifest_counts(written: Path) -> None:
    blob = (written / "val" / "manifest.json").read_bytes()
    folder = written / "val"
    manifest = read_manifest(folder)
    for bit in range(8 * len(blob)):
        hurt = bytearray(blob)
        hurt[bit // 8] ^= 1 << bit % 8
        assert parsed(bytes(hurt)) is None, f"bit {bit} makes no difference"
    assert parsed(blob) == manifest


def parsed(blob: bytes) -> Manifest | None:
    """As `read_manifest`, without a file; None where that refuses."""
    try:
        problems, intact = _parse_manifest(blob)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return problems if intact else None


@pytest.mark.parametrize("name", ["inputs.npy", "rejects.jsonl"])
def test_damage_to_what_lies_beside_the_shards_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_images(tmp_path / "raw")
    odd = Image.open(tmp_path / "raw" / "n00" / "0.JPEG").convert("CMYK")
    odd.save(tmp_path / "raw" / "n00" / "0.JPEG", "JPEG")
    out = tmp_path / "o"
    assert shard.main(["imagefolder", "--root", str(tmp_path / "raw"), "--out", str(out)]) == 0
    path = out / "train" / name
    blob = path.read_bytes()
    for position in range(0, len(blob), 7):
        path.write_bytes(
            blob[:position] + bytes([blob[position] ^ 1 << position % 8]) + blob[position + 1 :]
        )
        assert findings(out, capsys)
        path.write_bytes(blob[:position])
        assert findings(out, capsys)
    path.unlink()
    assert findings(out, capsys)
    path.write_bytes(blob)
    assert findings(out, capsys) == []


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx.npy", "inputs.npy"])
@pytest.mark.parametrize("what", ["pipe", "device without an end"])
def test_what_is_no_file_is_told_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, what: str
) -> None:
    write_images(tmp_path / "raw")
    arguments = ["--root", str(tmp_path / "raw"), "--out", str(tmp_path / "o"), "--shard-size=4"]
    assert shard.main(["imagefolder", *arguments]) == 0
    path = tmp_path / "o" / "train" / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    (line,) = findings(tmp_path / "o", capsys)
    assert line == f"wrong: {path}: cannot be read (not a regular file)"


def test_a_file_of_another_length_is_told_without_reading_it(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("shard-000001.tar", "shard-000001.idx.npy"):
        with (out / "train" / name).open("r+b") as file:
            file.truncate(2**42)  # sparse: takes no room on disk, and an hour to read
    problems = findings(out, capsys)
    assert [f"has {2**42} bytes instead of" in line for line in problems] == [True, True]


def test_a_val_that_was_wanted_and_never_begun_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "raw" / "train")
    write_images(tmp_path / "raw" / "val", first=100)
    arguments = ["imagefolder", "--root", str(tmp_path / "raw"), "--out", str(tmp_path / "o")]
    genuine = dataset_builder._write_split

    def train_only(job: Any, *rest: Any) -> Any:
        if job.split.name == "val":
            raise KeyboardInterrupt
        return genuine(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_builder, "_write_split", train_only)
        assert shard.main(arguments) == 130
    assert (tmp_path / "o" / "train" / "manifest.json").exists()
    capsys.readouterr()
    (line,) = findings(tmp_path / "o", capsys)
    assert "o/val: no manifest.json, so sharding did not finish" in line
    assert shard.main(arguments) == 0
    assert findings(tmp_path / "o", capsys) == []


def test_an_unlabelled_sample_is_intact_and_a_label_below_is_not(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(out, label=-4)
    (line,) = findings(out, capsys)
    assert "label -2 is not a class" in line
