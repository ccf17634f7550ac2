"""CIFAR's official pickles: read back pixel for pixel, and never trusted to call anything."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import shard
from tests.support.photos import crop
from vssl_dist.data.store.dataset import Dataset

PER_BATCH = 20


def batch(number: int) -> dict[bytes, Any]:
    """A batch as the official files hold it, of real crops."""
    ids = range(number * PER_BATCH, (number + 1) * PER_BATCH)
    planes = [crop(i, 10).transpose(2, 0, 1).reshape(-1) for i in ids]
    return {b"data": np.stack(planes), b"labels": [i % 10 for i in ids], b"batch_label": b"x"}


def write_cifar10(folder: Path) -> Path:
    """A small CIFAR-10 in the official layout; returns the root."""
    below = folder / "cifar-10-batches-py"
    below.mkdir(parents=True)
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        (below / name).write_bytes(pickle.dumps(batch(number), protocol=2))
    meta = {b"label_names": [f"class {n}".encode() for n in range(10)], b"num_vis": 3072}
    (below / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def decoded(dataset: Dataset) -> list[np.ndarray]:
    images = dataset.read_checked(np.arange(dataset.samples)).data
    return [np.asarray(Image.open(io.BytesIO(image.tobytes()))) for image in images]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cifar10(tmp_path / "raw")


def run(*arguments: object) -> int:
    return shard.main([str(a) for a in arguments])


def test_pixels_labels_and_order_are_the_official_ones(root: Path, tmp_path: Path) -> None:
    assert run("cifar10", "--root", root, "--out", tmp_path / "o", "--shard-size", 30) == 0
    train, val = (Dataset.open(tmp_path / "o" / name) for name in ("train", "val"))
    assert train.shard_sizes.tolist() == [30, 30, 30, 10]
    assert train.classes == tuple(f"class {n}" for n in range(10))
    assert train.rows(np.arange(100))["label"].tolist() == [i % 10 for i in range(100)]
    for number, image in enumerate(decoded(train) + decoded(val)):
        np.testing.assert_array_equal(image, crop(number, 10))


def test_the_archive_gives_the_bytes_of_the_unpacked_folder(root: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    ways = (root, root / "cifar-10-batches-py", packed, packed / "cifar-10-python.tar.gz")
    for number, way in enumerate(ways):
        assert run("cifar10", "--root", way, "--out", tmp_path / f"o{number}") == 0
    assert len({Dataset.open(tmp_path / f"o{n}" / "train").fingerprint for n in range(4)}) == 1
    assert sorted(packed.iterdir()) == [packed / "cifar-10-python.tar.gz"]


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps({b"data": Evil(tmp_path / "owned")}, protocol=2))
    assert run("cifar10", "--root", root, "--out", tmp_path / "o") == 2
    assert "data_batch_3: damaged or not the official pickle" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def damage(good: dict[bytes, Any], **changes: Any) -> bytes:
    return pickle.dumps({**good, **{k.encode(): v for k, v in changes.items()}}, protocol=2)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"not a pickle",
        pickle.dumps(batch(0), protocol=2)[:-400],
        pickle.dumps([1, 2]),
        damage(batch(0), data="text"),
        damage(batch(0), data=np.zeros((20, 3072), np.float32)),
        damage(batch(0), data=np.zeros((20, 3000), np.uint8)),
        damage(batch(0), labels=[0] * 19),
        damage(batch(0), labels=[10] * 20),
        damage(batch(0), labels=["a"] * 20),
        pickle.dumps({b"\xff": 1}, protocol=2),
    ],
)
def test_a_damaged_batch_is_one_line_that_names_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], blob: bytes
) -> None:
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(blob)
    assert run("cifar10", "--root", root, "--out", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data_batch_2: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"\x80\x02Nr" + (1 << 22).to_bytes(4, "little") + b".", "object 4194304 is numbered"),
        (b"(dp4194304\n.", "object 4194304 is numbered"),
        (b"\x80\x02cnumpy\nndarray\n(J\0\0\0\1U\1OtR.", "no attribute 'items'"),
        (b"\x80\x02c_codecs\nencode\nq\0(X\0\x80\0\0" + b"a" * 32768 + b"q\1X\6\0\0\0latin1"
         b"q\2tR" + b"h\0h\1h\2\x86R" * 1000 + b".", "more bytes than it is long"),
    ],
    ids=["numbered", "numbered in text", "shape", "one text many times"],
)  # fmt: skip
def test_what_a_pickle_only_states_takes_no_memory(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], blob: bytes, message: str
) -> None:
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(blob)
    tracemalloc.start()
    try:
        assert run("cifar10", "--root", root, "--out", tmp_path / "o") == 2
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    error = capsys.readouterr().err
    assert error.startswith("error: batches.meta: damaged or not the official pickle (")
    assert message in error


@pytest.mark.parametrize("names", [[], [1], [["a"]], "ab", [b"ok", None]], ids=str)
def test_class_names_are_text(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: object
) -> None:
    meta = root / "cifar-10-batches-py" / "batches.meta"
    meta.write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    assert run("cifar10", "--root", root, "--out", tmp_path / "o") == 2
    assert capsys.readouterr().err.startswith("error: batches.meta: holds no class names")


def test_a_damaged_archive_is_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    archive_bytes = archive.read_bytes()
    damaged_archives = [
        archive_bytes[:position] + b"\0" * 4 + archive_bytes[position + 4 :]
        for position in range(50, len(archive_bytes), 997)
    ]
    for blob in (b"", archive_bytes[: len(archive_bytes) // 2], *damaged_archives):
        archive.write_bytes(blob)
        assert run("cifar10", "--root", archive, "--out", tmp_path / "o") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {archive}: ")
        assert error.count("\n") == 1


def test_a_missing_file_is_named_with_what_can_be_done(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "cifar-10-batches-py" / "data_batch_4").unlink()
    assert run("cifar10", "--root", root, "--out", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert "data_batch_4: missing (--split" in error
    assert run("cifar10", "--root", root, "--out", tmp_path / "o", "--split", "val") == 0
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["val"]


@pytest.mark.parametrize("root_option", [[], ["--root", "{tmp}/nowhere"], ["--root", "{tmp}"]])
def test_a_root_without_cifar_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], root_option: list[str]
) -> None:
    options = [option.format(tmp=tmp_path) for option in root_option]
    assert run("cifar10", "--out", tmp_path / "o", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--root" in error or "--download" in error


def test_download_without_a_network_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_route(*args: object, **kwargs: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", no_route)
    monkeypatch.setattr("socket.getaddrinfo", no_route)
    options = ("--root", tmp_path / "raw", "--out", tmp_path / "o", "--download")
    assert run("cifar100", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: https://")
    assert "put cifar-100-python.tar.gz into" in error


@pytest.mark.slow
@pytest.mark.skipif("VSSL_TEST_DATA" not in os.environ, reason="VSSL_TEST_DATA is not set")
def test_real_cifar_comes_out_as_it_went_in(tmp_path: Path) -> None:
    import subprocess
    import sys

    unpack = Path(os.environ["VSSL_TEST_DATA"]) / "unpack_cifar.py"
    subprocess.run([sys.executable, str(unpack), "--out", str(tmp_path / "raw")], check=True)
    options = ("--root", tmp_path / "raw", "--out", tmp_path / "o")
    assert run("cifar10", *options, "--workers", 2) == 0
    raw: list[tuple[np.ndarray, list[int]]] = []
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        with (tmp_path / "raw" / "cifar-10-batches-py" / name).open("rb") as file:
            official = pickle.load(file, encoding="bytes")
        raw.append((official[b"data"], official[b"labels"]))
    want = np.concatenate([data for data, _ in raw]).reshape(-1, 3, 32, 32)
    train, val = (Dataset.open(tmp_path / "o" / name) for name in ("train", "val"))
    got = np.stack(decoded(train) + decoded(val)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(got, want)
    labels = [*train.rows(np.arange(50_000))["label"], *val.rows(np.arange(10_000))["label"]]
    assert labels == [label for _, numbers in raw for label in numbers]
    assert train.classes[:3] == ("airplane", "automobile", "bird")
    assert run("cifar100", *options, "--split", "val") == 2  # another dataset is there already
