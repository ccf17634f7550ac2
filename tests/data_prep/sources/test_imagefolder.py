"""Folders of class folders: what is found, in which order, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sharding import dataset as dataset_builder
from data_prep.sharding.dataset import fixed_permutation
from data_prep.sharding.writer import ShardWriteTask
from tests.support.photos import crop
from tests.support.sharding import refusal, sharded
from vssl_dist.data.store.dataset import Dataset


def write_images(folder: Path, classes: int = 3, each: int = 5, first: int = 0) -> None:
    for label in range(classes):
        (folder / f"n{label:02d}").mkdir(parents=True)
        for number in range(each):
            image = Image.fromarray(crop(first + number * classes + label, classes, (32, 70)))
            image.save(folder / f"n{label:02d}" / f"{number}.JPEG", "JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "raw" / "train")
    write_images(tmp_path / "raw" / "val", each=2, first=100)
    return tmp_path / "raw"


run = partial(sharded, "imagefolder")


def test_plain_files_arrive_byte_for_byte_with_their_class_and_size(
    root: Path, tmp_path: Path
) -> None:
    assert run(root, tmp_path / "o") == 0
    for split, total in (("train", 15), ("val", 6)):
        dataset = Dataset.open(tmp_path / "o" / split)
        files = sorted((root / split).glob("*/*"), key=lambda path: str(path))
        want = [files[number] for number in fixed_permutation(total)]
        samples = dataset.read_checked(np.arange(dataset.samples))
        assert [image.tobytes() for image in samples.data] == [path.read_bytes() for path in want]
        names = [dataset.classes[label] for label in samples.label]
        assert names == [path.parent.name for path in want]
        sizes = [Image.open(path).size for path in want]
        assert list(zip(samples.width, samples.height, strict=True)) == sizes


def test_classes_are_mixed_although_the_input_is_sorted_by_class(tmp_path: Path) -> None:
    write_images(tmp_path / "raw", classes=4, each=25)
    assert run(tmp_path / "raw", tmp_path / "o", "--shard-size", 50) == 0
    labels = Dataset.open(tmp_path / "o" / "train").rows(np.arange(100))["label"]
    for half in (labels[:50], labels[50:]):
        assert np.bincount(half.astype(int), minlength=4).min() >= 5


def test_limit_keeps_a_mixture_of_all_classes(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "o", "--limit", 8) == 0
    labels = Dataset.open(tmp_path / "o" / "train").rows(np.arange(8))["label"]
    assert len(set(labels.tolist())) == 3


def test_a_root_of_class_folders_is_a_training_split(root: Path, tmp_path: Path) -> None:
    assert run(root / "train", tmp_path / "o") == 0
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["train"]


def test_a_folder_called_test_serves_as_val(root: Path, tmp_path: Path) -> None:
    (root / "val").rename(root / "test")
    assert run(root, tmp_path / "o") == 0
    assert Dataset.open(tmp_path / "o" / "val").samples == 6


def test_nested_folders_count_and_other_files_do_not(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "train" / "n01", root / "train" / "n00" / "more")
    (root / "train" / "n00" / "notes.txt").write_text("no image")
    (root / "train" / "n00" / "._0.JPEG").write_bytes(b"resource fork")
    assert run(root, tmp_path / "o") == 0
    assert Dataset.open(tmp_path / "o" / "train").samples == 20


def test_labels_of_val_are_those_of_train_even_if_val_lacks_a_class(
    root: Path, tmp_path: Path
) -> None:
    shutil.rmtree(root / "val" / "n00")
    assert run(root, tmp_path / "o", "--split", "val") == 0
    val = Dataset.open(tmp_path / "o" / "val")
    assert val.classes == ("n00", "n01", "n02")
    assert set(val.rows(np.arange(4))["label"].tolist()) == {1, 2}


def test_unusable_folders_are_refused_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "none", tmp_path / "o") == 2
    assert "none: no such file or folder (--root)" in refusal(capsys)

    assert run(root / "train" / "n00", tmp_path / "o") == 2
    assert "no class folders in it" in refusal(capsys)

    assert run(root / "train" / "n00" / "0.JPEG", tmp_path / "o") == 2
    assert "cannot be listed" in refusal(capsys)

    (root / "train" / "empty").mkdir()
    assert run(root, tmp_path / "o") == 2
    assert "empty: no image in this class folder" in refusal(capsys)
    (root / "train" / "empty").rmdir()

    (root / "val" / "n77").mkdir()
    assert run(root, tmp_path / "o") == 2
    assert "n77: a class that the training folder does not have" in refusal(capsys)
    (root / "val" / "n77").rmdir()

    (root / "train" / "n00" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert run(root, tmp_path / "o") == 2
    assert "gone.png: cannot be read" in refusal(capsys)
    assert not (tmp_path / "o").exists()

    assert run(root / "train", tmp_path / "o", "--split", "val") == 2
    assert "no folder val or test" in refusal(capsys)

    assert run(root, tmp_path / "o", "--download") == 2
    assert "imagefolder has no --download" in refusal(capsys)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_does_not_decode_is_named_and_nothing_is_sealed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    path = root / "train" / "n01" / "3.JPEG"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    options = ("--shard-size", 4, "--workers", workers)
    assert run(root, tmp_path / "o", *options) == 2
    assert refusal(capsys).startswith(f"{path}: not a readable image")
    assert not (tmp_path / "o" / "train" / "manifest.json").exists()
    assert not list((tmp_path / "o").rglob("*.tmp-*"))


def test_a_repaired_image_lets_the_same_call_go_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "train" / "n01" / "3.JPEG"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    assert run(root, tmp_path / "o") == 2
    path.write_bytes(good)
    assert run(root, tmp_path / "o") == 0
    assert run(root, tmp_path / "fresh") == 0
    prints = {Dataset.open(tmp_path / name / "train").fingerprint for name in ("o", "fresh")}
    assert len(prints) == 1
    assert not list((tmp_path / "o").rglob("rejects.jsonl"))


def interrupted(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop where a kill would leave the most: after the second of several shards."""
    genuine, written = dataset_builder.write_shard, []

    def twice(task: ShardWriteTask) -> Iterator[int]:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(task.number)
        return genuine(task)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_builder, "write_shard", twice)
        assert run(root, out, "--shard-size", 4) == 130
    assert len(list(out.glob("train/*.tar"))) == 2


def test_an_image_of_equal_size_put_in_after_an_interruption_is_noticed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for label in range(3):
        for number in (0, 3):
            path = root / "train" / f"n{label:02d}" / f"{number}.JPEG"
            good, facts = path.read_bytes(), path.stat()
            out = tmp_path / f"o{label}{number}"
            interrupted(root, out, monkeypatch)
            path.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            capsys.readouterr()
            assert run(root, out, "--shard-size", 4) == 2
            assert "an input image was replaced since this was begun" in refusal(capsys)
            assert not list(out.rglob("manifest.json"))
            path.write_bytes(good)
            assert run(root, out, "--shard-size", 4) == 0


def test_touched_images_are_looked_at_again_and_found_to_be_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(root, tmp_path / "o", monkeypatch)
    for path in root.rglob("*.JPEG"):
        path.touch()
    assert run(root, tmp_path / "o", "--shard-size", 4) == 0


def test_the_same_images_elsewhere_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "another" / "name")
    assert run(root, tmp_path / "o0") == 0
    assert run(tmp_path / "another" / "name", tmp_path / "o1") == 0
    for path in (tmp_path / "o0").rglob("*.*"):
        assert (
            path.read_bytes() == (tmp_path / "o1" / path.relative_to(tmp_path / "o0")).read_bytes()
        )


def test_an_oddity_in_the_folder_is_made_plain(root: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(crop(0, 3)).convert("CMYK").save(stream, "JPEG")
    (root / "train" / "n00" / "0.JPEG").write_bytes(stream.getvalue())
    assert run(root, tmp_path / "o") == 0
    dataset = Dataset.open(tmp_path / "o" / "train")
    images = dataset.read_checked(np.arange(15)).data
    assert {Image.open(io.BytesIO(image.tobytes())).mode for image in images} == {"RGB"}


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[None]:
    """Root may read anything, so take on another identity for permission tests."""
    if os.geteuid() != 0:
        yield
        return
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path(folder.anchor):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("locked", ["train", "train/n01", "train/n01/2.JPEG"])
def test_what_may_not_be_read_is_named(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    locked: str,
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    (root / locked).chmod(0)
    request.getfixturevalue("ordinary_user")
    try:
        assert run(root, tmp_path / "out" / "o") == 2
    finally:
        os.seteuid(os.getuid())
        (root / locked).chmod(0o755)
    assert "Permission denied" in refusal(capsys)


def test_what_may_not_be_read_is_skipped_and_listed_if_that_is_wanted(
    root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_images(root / "train" / "n00" / "deep", classes=1)
    locked = ["n00/deep", "n01", "n02/2.JPEG", "n02/notes"]
    (root / "train" / "n02" / "notes").write_text("words")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    for name in locked:
        (root / "train" / name).chmod(0)
    request.getfixturevalue("ordinary_user")
    try:
        assert run(root, tmp_path / "out" / "o", "--on-bad", "skip") == 0
    finally:
        os.seteuid(os.getuid())
        for name in locked:
            (root / "train" / name).chmod(0o755)
    folder = tmp_path / "out" / "o" / "train"
    records = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == locked
    assert {record["reason"] for record in records} == {"cannot be read (Permission denied)"}
    assert Dataset.open(folder).samples == 9


def test_an_out_that_may_not_be_written_is_named(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    request.getfixturevalue("ordinary_user")
    assert run(root, tmp_path / "out" / "o") == 2
    assert "o/train: cannot be made (Permission denied)" in refusal(capsys)


@pytest.mark.parametrize("name", ["val", "validation", "Test"])
def test_splits_without_a_training_one_are_not_taken_for_classes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (root / "train").rename(tmp_path / "elsewhere")
    (root / "val").rename(root / name)
    assert run(root, tmp_path / "o") == 2
    assert "looks like a split, and there is no train: call the folder" in refusal(capsys)
    assert not (tmp_path / "o").exists()


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "raw", classes=2)
    (tmp_path / "raw" / "n00").rename(tmp_path / "raw" / "test")
    (tmp_path / "raw" / "n01").rename(tmp_path / "raw" / "val")
    assert run(tmp_path / "raw", tmp_path / "o") == 0
    assert Dataset.open(tmp_path / "o" / "train").classes == ("test", "val")
    shutil.copytree(tmp_path / "raw" / "val", tmp_path / "more" / "val" / "nested")
    shutil.copytree(tmp_path / "raw" / "test", tmp_path / "more" / "cat")
    assert run(tmp_path / "more", tmp_path / "m") == 0
    assert Dataset.open(tmp_path / "m" / "train").classes == ("cat", "val")
