"""Damaged shards are refused at the start, or caught while reading."""

from __future__ import annotations

import os
import shutil
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.damage import (
    BACKENDS,
    alone,
    config,
    flip,
    joined,
    loader,
    one_line,
    place,
    take,
)
from tests.support.shards import rewritten, stored, tiny_shards, write_shards
from vssl_dist.data.store import handles
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError


def cuts(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The second shard, hurt in the ways of which readers of plain tars miss the most."""
    path = folder / "shard-000001.tar"
    blob = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    third, label = members[4], members[5]
    return {
        "inside a member": (blob[: third.offset_data + 100], third.offset_data + 100),
        "on a block": (blob[: third.offset], third.offset),
        "between image and label": (blob[: label.offset], label.offset),
        "empty": (b"", 0),
        "header": (blob[: third.offset] + b"\xff" * 512 + blob[third.offset + 512 :], len(blob)),
        "flipped byte": (
            blob[: third.offset_data + 50]
            + bytes([blob[third.offset_data + 50] ^ 1])
            + blob[third.offset_data + 51 :],
            len(blob),
        ),
    }


HURTS = [
    "inside a member",
    "on a block",
    "between image and label",
    "empty",
    "header",
    "flipped byte",
]


@pytest.mark.parametrize("how", HURTS)
def test_a_hurt_shard_is_refused_at_the_start_or_caught_while_reading(
    folder: Path, how: str, at_once: None
) -> None:
    running = Dataset.open(folder)
    expected = [image.tobytes() for image in running.read(np.arange(13, 26))]
    blob, length = cuts(folder)[how]
    whole = (folder / "shard-000001.tar").stat().st_size
    (folder / "shard-000001.tar").write_bytes(blob)
    if length < whole:
        with pytest.raises(DataError, match=f"shard-000001.tar has {length} bytes") as error:
            Dataset.open(folder)
        one_line(error)
    running.close()
    samples = running.read_checked(np.arange(13, 26))
    lost = {s.planned for s in samples.substitutions}
    for row, image in enumerate(samples.data):
        assert (image.tobytes() == expected[row]) == (13 + row not in lost)
    assert (15 in lost) == (how not in ("between image and label", "header"))
    assert (len(lost) == 13) == (how == "empty")
    assert bool(lost) == (how != "header")  # no header is ever read


@pytest.mark.parametrize("how", ["missing", "dangling", "fifo", "folder", "zeros"])
def test_shards_that_are_not_there_are_refused_at_the_start_with_the_list(
    folder: Path, how: str
) -> None:
    names = ["shard-000001.tar", "shard-000003.tar"]
    for name in names:
        path = folder / name
        size = path.stat().st_size
        path.unlink()
        if how == "dangling":
            path.symlink_to(folder / "nowhere.tar")
        elif how == "fifo":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how == "zeros":
            path.write_bytes(bytes(size))
    with pytest.raises(DataError) as error:
        loader(config(folder))
    assert all(name in one_line(error) for name in names)
    assert "data_prep/verify.py" in str(error.value)


def test_swapped_shards_of_one_length_are_refused_at_the_start_with_the_list(
    sound: Path, tmp_path: Path
) -> None:
    first, *other_shards = stored(sound)
    folder = write_shards(tmp_path / "train", [first, *other_shards, first[::-1]])
    first_tar = folder / "shard-000000.tar"
    last_tar = folder / f"shard-{len(other_shards) + 1:06d}.tar"
    assert first_tar.stat().st_size == last_tar.stat().st_size
    first_tar.rename(tmp_path / "held")
    last_tar.rename(first_tar)
    (tmp_path / "held").rename(last_tar)
    Dataset.open(folder)  # to stat alone nothing is wrong
    with pytest.raises(DataError, match="damaged or swapped") as error:
        loader(config(folder))
    assert all(path.name in one_line(error) for path in (first_tar, last_tar))
    # Of two ranks each looks at every other shard, so one of them must find one.
    with pytest.raises(DataError, match="damaged or swapped"):
        [loader(config(folder), rank, 2) for rank in range(2)]


def test_unreadable_shards_are_refused_at_the_start_with_the_list(folder: Path) -> None:
    names = ["shard-000000.tar", "shard-000002.idx.npy"]
    program = f"""
import os, tempfile, shutil
from pathlib import Path
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
with tempfile.TemporaryDirectory() as name:
    copy = Path(shutil.copytree({str(folder)!r}, Path(name) / "train"))
    for hidden in {names!r}:
        (copy / hidden).chmod(0)
    for path in (Path(name), copy):
        path.chmod(0o755)
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        if os.geteuid() == 0:  # who may read everything
            os.setgid(65534)
            os.setuid(65534)
        try:
            Dataset.open(copy)
        except DataError as error:
            print(error, flush=True)
        os._exit(0)
"""
    done = alone(program)
    assert done.returncode == 0, done.stderr
    assert all(f"{name} may not be read" in done.stdout for name in names)
    assert done.stdout.count("\n") == 1


def test_a_long_list_of_missing_shards_stays_one_line(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "train", 40, 1)
    for number in range(10, 40):
        (folder / f"shard-{number:06d}.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000010\.tar is missing.* and 18 more") as error:
        Dataset.open(folder)
    assert len(one_line(error)) < 1500


def test_a_start_with_one_bad_first_image_is_not_refused(folder: Path) -> None:
    tar, offset, _ = place(folder, 13)
    flip(tar, offset + 9)
    source = loader(config(folder))
    take(source, 4)
    assert [(s.planned, s.used) for s in source.substitutions] == [(13, 14)]


def test_a_shard_that_vanishes_under_a_run_is_asked_for_again_and_then_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "_RETRY_PAUSES_S", (0.1, 0.2, 0.2))
    source = loader(config(folder))
    (folder / "shard-000002.tar").rename(folder / "away")
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"shard-000002\.tar: cannot be opened") as error:
        take(source, 4)
    one_line(error)
    assert time.monotonic() - begun >= 0.5


def test_a_shard_that_comes_back_in_time_costs_nothing(
    folder: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "_RETRY_PAUSES_S", (0.3, 0.3, 5.0))
    source = loader(config(folder))
    shutil.move(folder / "shard-000002.tar", folder / "away")
    back = threading.Timer(0.4, shutil.move, (folder / "away", folder / "shard-000002.tar"))
    back.start()
    actual = joined(take(source, 4))
    back.join()
    expected = joined(take(loader(config(sound)), 4))
    assert actual[0] == expected[0]
    assert torch.equal(actual[2], expected[2])
    assert source.substitutions == []


def test_another_file_in_place_of_an_open_shard_is_not_mixed_in(
    folder: Path, tmp_path: Path, at_once: None
) -> None:
    replacement = tmp_path / "other"
    dataset = Dataset.open(folder)
    expected = dataset.read(np.arange(13, 26))
    replacement.write_bytes(bytes(reversed((folder / "shard-000001.tar").read_bytes())))
    replacement.rename(folder / "shard-000001.tar")
    still = dataset.read_checked(np.arange(13, 26))  # the old file is open
    assert [a.tobytes() for a in still.data] == [b.tobytes() for b in expected]
    dataset.close()
    substitutions = dataset.read_checked(np.arange(13, 26)).substitutions
    assert [(s.planned, s.used) for s in substitutions] == [
        (sample, 26) for sample in range(13, 26)
    ]
    assert "crc32 differs" in substitutions[0].reason
    with pytest.raises(DataError, match=r"shard-000001\.tar \(no image is in its place") as error:
        dataset.probe()
    one_line(error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["flipped byte", "web page"])
def test_one_bad_image_costs_no_batch_where_it_is_alone_in_its_shard(
    tmp_path: Path, backend: str, how: str
) -> None:
    folder = tiny_shards(tmp_path / "train", 61, 15)  # 60 is alone, and 0 comes after it
    if how == "web page":
        folder = rewritten(folder, tmp_path / "bad", {60: b"<html>", 0: b"<html>"})
    else:
        for sample in (60, 0):
            tar, offset, _ = place(folder, sample)
            flip(tar, offset + 20)
    alone = loader(config(folder, backend))
    batches = take(alone, 4)
    assert {(s.planned, s.used) for s in alone.substitutions} == {(60, 1), (0, 1)}
    ranks = [loader(config(folder, backend), rank, 2) for rank in range(2)]
    rank_batches = [take(source, 4) for source in ranks]
    for step, whole in enumerate(batches):
        assert torch.equal(
            joined([batches[step] for batches in rank_batches])[2], joined([whole])[2]
        )
