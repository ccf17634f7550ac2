"""STL-10's official binaries, read back pixel for pixel against torchvision's own reading."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import verify
from tests.support.archives import STL10_COUNTS as COUNTS
from tests.support.archives import STL10_NAMES as NAMES
from tests.support.archives import stl10_pixels as pixels
from tests.support.archives import write_stl10
from tests.support.sharding import refusal, sharded
from vssl_dist.data.store.dataset import Dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_stl10(tmp_path / "raw")


run = partial(sharded, "stl10")


def load(folder: Path) -> tuple[np.ndarray, list[int]]:
    dataset = Dataset.open(folder)
    samples = dataset.read_checked(np.arange(dataset.samples))
    images = [np.asarray(Image.open(io.BytesIO(image.tobytes()))) for image in samples.data]
    return np.stack(images), samples.label.tolist()


def test_labelled_splits_keep_pixels_labels_and_order(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "o", "--shard-size", 8) == 0
    for split, official_split in (("train", "train"), ("val", "test")):
        images, labels = load(tmp_path / "o" / split)
        np.testing.assert_array_equal(images, pixels(official_split))
        assert labels == [n * 7 % 10 for n in range(COUNTS[official_split])]
        assert Dataset.open(tmp_path / "o" / split).classes == NAMES
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


def test_it_is_read_as_torchvision_reads_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssl_dist.vision import torchvision

    STL10 = torchvision().datasets.STL10
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    assert run(root, tmp_path / "o") == 0
    for split, official_split in (("train", "train"), ("val", "test")):
        torchvision_split = STL10(str(root), split=official_split)
        images, labels = load(tmp_path / "o" / split)
        np.testing.assert_array_equal(images, [np.asarray(image) for image, _ in torchvision_split])
        assert labels == torchvision_split.labels.tolist()


@pytest.mark.parametrize("split", ["unlabeled", "unlabelled", "train+unlabeled"])
def test_unlabelled_images_have_the_label_minus_one_and_are_all_there(
    root: Path, tmp_path: Path, split: str
) -> None:
    assert run(root, tmp_path / "o", "--split", split, "--workers", 2, "--shard-size", 16) == 0
    (folder,) = (tmp_path / "o").iterdir()
    images, labels = load(folder)
    want = {image.tobytes(): -1 for image in pixels("unlabeled")}
    if split.startswith("train"):
        want |= {image.tobytes(): n * 7 % 10 for n, image in enumerate(pixels("train"))}
    assert dict(zip((image.tobytes() for image in images), labels, strict=True)) == want
    assert len(images) == len(want)
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


def test_the_archive_gives_the_bytes_of_the_folder(root: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "stl10_binary.tar.gz", "w:gz") as tar:
        tar.add(root / "stl10_binary", "stl10_binary")
    ways = (root, root / "stl10_binary", packed, packed / "stl10_binary.tar.gz")
    for number, way in enumerate(ways):
        assert run(way, tmp_path / f"o{number}") == 0
    for split in ("train", "val", "unlabeled"):
        prints = {Dataset.open(tmp_path / f"o{n}" / split).fingerprint for n in range(4)}
        assert len(prints) == 1
    assert [path.name for path in packed.iterdir()] == ["stl10_binary.tar.gz"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train_X.bin", lambda b: b[:-1], "train_X.bin: 552959 bytes are no whole number"),
        ("train_X.bin", lambda b: b[:-27648], "train_y.bin: 20 labels for 19 images"),
        ("train_y.bin", lambda b: b"\0" + b[1:], "labels are not from 1 to 10"),
        ("train_y.bin", lambda b: b"\x0b" + b[1:], "labels are not from 1 to 10"),
        ("test_X.bin", lambda b: b"", "test_X.bin: 0 bytes"),
        ("unlabeled_X.bin", lambda b: b[:5], "unlabeled_X.bin: 5 bytes"),
        ("class_names.txt", lambda b: b"", "class_names.txt is empty"),
        ("test_y.bin", None, "test_y.bin: cannot be read (No such file"),
        ("class_names.txt", None, "neither stl10_binary/ nor stl10_binary.tar.gz in it"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: Callable[[bytes], bytes] | None,
    message: str,
) -> None:
    path = root / "stl10_binary" / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    assert run(root, tmp_path / "o") == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "o").exists()


def test_a_test_image_among_the_unlabelled_is_a_leak(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "stl10_binary" / "unlabeled_X.bin"
    leaked = pixels("test")[5].transpose(2, 1, 0).tobytes()
    path.write_bytes(leaked + path.read_bytes()[len(leaked) :])
    assert run(root, tmp_path / "o") == 2
    assert "is in unlabeled and in val (1 such images)" in refusal(capsys)
    assert run(root, tmp_path / "o", "--dedup") == 0
    assert Dataset.open(tmp_path / "o" / "unlabeled").samples == 49
    assert Dataset.open(tmp_path / "o" / "val").samples == 12
