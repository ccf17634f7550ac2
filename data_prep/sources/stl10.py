"""STL-10 from the official binaries, unpacked or still in their archive.

``unlabeled`` are its 100,000 images without labels, ``train+unlabeled`` what it is meant to be
pretrained on.  Out of the archive they are held in memory (2.8 GB); out of files they are not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.errors import DataError

from ..archives.tars import read_gzipped_members
from ..images.pixels import ArrayImages
from .base import (
    UNLABELED,
    SourceRequest,
    Split,
)
from .download import fetch_archive

DATASET = "stl10"
FOLDER = "stl10_binary"
ARCHIVE = f"{FOLDER}.tar.gz"
SIDE = 96
SPLITS = ("train", "val", "unlabeled", "train+unlabeled")

_CLASS_NAMES_FILE = "class_names.txt"
_FILES_BY_PART = {
    "train": ("train_X.bin", "train_y.bin"),
    "val": ("test_X.bin", "test_y.bin"),
    "unlabeled": ("unlabeled_X.bin", ""),
}
_IMAGE_BYTES = 3 * SIDE * SIDE
_MAX_FILE_BYTES = 1 << 32

FileBytes = NDArray[np.uint8]


def stl10(request: SourceRequest) -> list[Split]:
    """Read the requested splits.

    Raises:
        DataError: A file is missing, damaged, or of another size than its labels say.
    """
    if request.download and request.root is not None:
        fetch_archive(DATASET, request.root)
    root = request.require_root()
    official_splits = {name: name.split("+") for name in request.splits}
    needed_files = {
        file
        for name in official_splits
        for official_split in official_splits[name]
        for file in _FILES_BY_PART[official_split]
        if file
    }
    bytes_by_file, location = _read_files(root, sorted(needed_files | {_CLASS_NAMES_FILE}))
    classes = tuple(bytes_by_file[_CLASS_NAMES_FILE].tobytes().decode("utf-8", "replace").split())
    if not classes:
        raise DataError(f"{location}: {_CLASS_NAMES_FILE} is empty: fetch {ARCHIVE} again")
    return [
        _make_split(name, official_splits[name], classes, bytes_by_file, location)
        for name in request.splits
    ]


def _make_split(
    name: str,
    official_splits: list[str],
    classes: tuple[str, ...],
    bytes_by_file: dict[str, FileBytes],
    location: Path,
) -> Split:
    digest = hashlib.sha256(bytes_by_file[_CLASS_NAMES_FILE].data)
    rows: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    file_starts: list[tuple[int, str]] = []
    for official_split in official_splits:
        pixels, split_labels = _read_official_split(
            official_split, len(classes), bytes_by_file, location
        )
        file_starts.append((sum(map(len, rows)), _FILES_BY_PART[official_split][0]))
        rows.append(pixels)
        labels.append(split_labels)
        for file in filter(None, _FILES_BY_PART[official_split]):
            digest.update(hashlib.sha256(bytes_by_file[file].data).digest())
    return Split(
        dataset=DATASET,
        name=name,
        classes=classes,
        labels=np.concatenate(labels),
        make_images=lambda numbers: ArrayImages(tuple(rows), numbers, (3, SIDE, SIDE), (2, 1, 0)),
        facts={"input": digest.hexdigest()},
        # The labelled parts are mixed as they are; of the other nobody knows.
        is_grouped_by_class="unlabeled" in official_splits,
        name_of=lambda number: _sample_name(file_starts, number),
        location=str(location),
    )


def _read_official_split(
    official_split: str, classes: int, bytes_by_file: dict[str, FileBytes], location: Path
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read ``(N, 27648)`` pixels and ``(N,)`` labels of one of the official pairs of files."""
    image_file, label_file = _FILES_BY_PART[official_split]
    pixels = bytes_by_file[image_file]
    if not len(pixels) or len(pixels) % _IMAGE_BYTES:
        raise DataError(
            f"{location}: {image_file}: {len(pixels)} bytes are no whole number of images"
        )
    rows = pixels.reshape(-1, _IMAGE_BYTES)
    if not label_file:
        return rows, np.full(len(rows), UNLABELED, np.int64)
    labels = bytes_by_file[label_file].astype(np.int64) - 1
    if len(labels) != len(rows):
        raise DataError(f"{location}: {label_file}: {len(labels)} labels for {len(rows)} images")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{location}: {label_file}: labels are not from 1 to {classes}")
    return rows, labels


def _read_files(root: Path, files: list[str]) -> tuple[dict[str, FileBytes], Path]:
    """Read files by name, mapped or into memory; returns also the folder or archive of them."""
    for folder in (root / FOLDER, root):
        if (folder / _CLASS_NAMES_FILE).is_file():
            return {name: _map_file(folder / name) for name in files}, folder
    archive = root if root.is_file() else root / ARCHIVE
    if not archive.is_file():
        raise DataError(f"{root}: neither {FOLDER}/ nor {ARCHIVE} in it (--download fetches it)")
    members = read_gzipped_members(archive, [f"{FOLDER}/{name}" for name in files], _MAX_FILE_BYTES)
    for name in files:
        if f"{FOLDER}/{name}" not in members:
            raise DataError(f"{archive}: has no {FOLDER}/{name}")
    return {name: np.frombuffer(members[f"{FOLDER}/{name}"], np.uint8) for name in files}, archive


def _map_file(path: Path) -> FileBytes:
    try:
        if not path.stat().st_size:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}) (--split makes one split only)"
        ) from error


def _sample_name(file_starts: list[tuple[int, str]], number: int) -> str:
    start, file = max(file_start for file_start in file_starts if file_start[0] <= number)
    return f"{file}[{number - start}]"
