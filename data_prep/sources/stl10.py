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
from ..images.pixels import PixelRows
from .base import (
    UNLABELED,
    Request,
    Split,
)
from .download import fetch_archive

DATASET = "stl10"
FOLDER = "stl10_binary"
ARCHIVE = f"{FOLDER}.tar.gz"
SIDE = 96
SPLITS = ("train", "val", "unlabeled", "train+unlabeled")

_NAMES = "class_names.txt"
_PARTS = {
    "train": ("train_X.bin", "train_y.bin"),
    "val": ("test_X.bin", "test_y.bin"),
    "unlabeled": ("unlabeled_X.bin", ""),
}
_ROW = 3 * SIDE * SIDE
_MAX_BYTES = 1 << 32

Column = NDArray[np.uint8]


def stl10(request: Request) -> list[Split]:
    """The wanted splits.

    Raises:
        DataError: A file is missing, damaged, or of another size than its labels say.
    """
    if request.download and request.root is not None:
        fetch_archive(DATASET, request.root)
    root = request.existing_root()
    parts = {name: name.split("+") for name in request.splits}
    needed = {file for name in parts for part in parts[name] for file in _PARTS[part] if file}
    blobs, place = _read(root, sorted(needed | {_NAMES}))
    classes = tuple(blobs[_NAMES].tobytes().decode("utf-8", "replace").split())
    if not classes:
        raise DataError(f"{place}: {_NAMES} is empty: fetch {ARCHIVE} again")
    return [_split(name, parts[name], classes, blobs, place) for name in request.splits]


def _split(
    name: str, parts: list[str], classes: tuple[str, ...], blobs: dict[str, Column], place: Path
) -> Split:
    digest = hashlib.sha256(blobs[_NAMES].data)
    rows: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    called: list[tuple[int, str]] = []
    for part in parts:
        pixels, numbers = _part(part, len(classes), blobs, place)
        called.append((sum(map(len, rows)), _PARTS[part][0]))
        rows.append(pixels)
        labels.append(numbers)
        for file in filter(None, _PARTS[part]):
            digest.update(hashlib.sha256(blobs[file].data).digest())
    return Split(
        dataset=DATASET,
        name=name,
        classes=classes,
        labels=np.concatenate(labels),
        images=lambda which: PixelRows(tuple(rows), which, (3, SIDE, SIDE), (2, 1, 0)),
        facts={"input": digest.hexdigest()},
        # The labelled parts are mixed as they are; of the other nobody knows.
        grouped="unlabeled" in parts,
        names=lambda number: _name(called, number),
        where=str(place),
    )


def _part(
    part: str, classes: int, blobs: dict[str, Column], place: Path
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """``(N, 27648)`` pixels and ``(N,)`` labels of one of the official pairs of files."""
    images, labels = _PARTS[part]
    pixels = blobs[images]
    if not len(pixels) or len(pixels) % _ROW:
        raise DataError(f"{place}: {images}: {len(pixels)} bytes are no whole number of images")
    rows = pixels.reshape(-1, _ROW)
    if not labels:
        return rows, np.full(len(rows), UNLABELED, np.int64)
    numbers = blobs[labels].astype(np.int64) - 1
    if len(numbers) != len(rows):
        raise DataError(f"{place}: {labels}: {len(numbers)} labels for {len(rows)} images")
    if numbers.min() < 0 or numbers.max() >= classes:
        raise DataError(f"{place}: {labels}: labels are not from 1 to {classes}")
    return rows, numbers


def _read(root: Path, files: list[str]) -> tuple[dict[str, Column], Path]:
    """The files by name, mapped or in memory, and where they were found."""
    for folder in (root / FOLDER, root):
        if (folder / _NAMES).is_file():
            return {name: _file(folder / name) for name in files}, folder
    archive = root if root.is_file() else root / ARCHIVE
    if not archive.is_file():
        raise DataError(f"{root}: neither {FOLDER}/ nor {ARCHIVE} in it (--download fetches it)")
    found = read_gzipped_members(archive, [f"{FOLDER}/{name}" for name in files], _MAX_BYTES)
    for name in files:
        if f"{FOLDER}/{name}" not in found:
            raise DataError(f"{archive}: has no {FOLDER}/{name}")
    return {n: np.frombuffer(found[f"{FOLDER}/{n}"], np.uint8) for n in files}, archive


def _file(path: Path) -> Column:
    try:
        if not path.stat().st_size:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}) (--split makes one split only)"
        ) from error


def _name(called: list[tuple[int, str]], number: int) -> str:
    start, file = max(pair for pair in called if pair[0] <= number)
    return f"{file}[{number - start}]"
