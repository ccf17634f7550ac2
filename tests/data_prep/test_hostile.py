"""Files that are not what they seem: each is one printable line, at once, and nothing hangs."""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import shard, verify
from tests.support.archives import jpeg
from tests.support.photos import tiny_dataset
from tests.support.shards import edit_manifest
from vssl_dist.data.store.dataset import Dataset

PIPE, DEVICE = "a pipe that nobody writes to", "a device without an end"


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A test that waits for something that never comes fails."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder of two classes."""
    for number in range(6):
        path = tmp_path / "raw" / f"c{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return tmp_path / "raw"


def sharded(source: str, root: Path, out: Path, *options: str) -> int:
    arguments = [source, "--root", str(root), "--out", str(out), "--workers", "1", *options]
    return shard.main(arguments)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, all of which a terminal shows as it is."""
    text = capsys.readouterr().err
    (line,) = [line for line in text.splitlines() if line.strip() and "━" not in line]
    assert line.startswith("error: ")
    assert line.isprintable()
    return line


def put(path: Path, what: str) -> None:
    path.unlink(missing_ok=True)
    if what == PIPE:
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("what", [PIPE, DEVICE])
def test_what_only_looks_like_an_image_is_told_and_can_be_left_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    put(root / "c0" / "x.jpg", what)
    assert sharded("imagefolder", root, tmp_path / "o") == 2
    assert "c0/x.jpg: not a regular file: repair or remove it" in refusal(capsys)
    assert sharded("imagefolder", root, tmp_path / "skipped", "--on-bad", "skip") == 0
    assert Dataset.open(tmp_path / "skipped" / "train").samples == 6


@pytest.mark.parametrize("what", [PIPE, DEVICE])
def test_what_only_looks_like_a_batch_of_cifar_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    folder = tmp_path / "raw" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {b"label_names": [b"%d" % number for number in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    put(folder / "data_batch_3", what)
    assert sharded("cifar10", tmp_path / "raw", tmp_path / "o") == 2
    assert "data_batch_3: cannot be read (not a regular file)" in refusal(capsys)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "back\rspace", "\u202egnp"])
def test_a_name_cannot_forge_a_line_or_command_a_terminal(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (root / "c0" / f"{name}.jpg").write_bytes(b"no image")
    assert sharded("imagefolder", root, tmp_path / "o") == 2
    assert "of no known format" in refusal(capsys)
    (root / name).mkdir()
    assert sharded("imagefolder", root, tmp_path / "o") == 2
    assert "no image in this class folder" in refusal(capsys)


def test_names_that_are_no_text_are_written_verified_and_shown(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(b"caf\xe9\xff")
    (root / odd).mkdir()
    (root / odd / f"{odd}.jpg").write_bytes(jpeg(50))
    strict = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", strict)
    assert sharded("imagefolder", root, tmp_path / odd) == 0
    assert verify.main([str(tmp_path / odd), "--workers", "1"]) == 0
    strict.flush()
    assert strict.buffer.getvalue().count(rb"caf\udce9\udcff") == 2  # type: ignore[attr-defined]
    dataset = Dataset.open(tmp_path / odd / "train")
    assert dataset.samples == 7
    assert odd in dataset.classes


@pytest.mark.parametrize("label", [b"dog", b"9" * 5000, b"\x00", b"1 e3"])
def test_a_label_of_another_kind_is_named_with_its_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], label: bytes
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, text in (("first", b"1"), ("odd", label)):
            for suffix, data in (("jpg", jpeg(len(key))), ("cls", text)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert sharded("webdataset", tmp_path / "a.tar", tmp_path / "o") == 2
    line = refusal(capsys)
    assert "first.jpg has the label 1 and odd.jpg has the label " in line
    assert len(line) < 300


@pytest.mark.parametrize(
    "source",
    [
        {"max_pixels": "many"},
        {"max_pixels": 0},
        {"max_pixels": []},
        {"labels": 5},
        {"labels": [1]},
        {"labels": ["a", "b"]},
    ],
    ids=str,
)
def test_a_manifest_that_states_nonsense_of_its_source_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: dict[str, object]
) -> None:
    folder = tiny_dataset(tmp_path, samples=4, classes=2)
    edit_manifest(folder, source=source)
    assert verify.main([str(folder), "--workers", "1"]) == 1
    assert f"wrong: {folder}/manifest.json: {next(iter(source))} " in capsys.readouterr().out
