"""A folder of class folders, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.images import Encoded, plain
from data_prep.split import Request, Split
from vssl_dist.data.manifest import DataError

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp",
)  # fmt: skip
VALIDATION = ("val", "test")
"""Names under which the second split is looked for, in this order."""


@dataclass(frozen=True)
class Files:
    """Image files to read."""

    folder: Path
    names: Sequence[str]

    def __iter__(self) -> Iterator[Encoded]:
        for name in self.names:
            path = self.folder / name
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            yield plain(data, path)


def imagefolder(request: Request) -> list[Split]:
    """``root/train`` and ``root/val`` (or ``test``), or ``root`` itself as training images.

    Raises:
        DataError: A folder is missing, unreadable, or without images.
    """
    if request.download:
        raise DataError("imagefolder has no --download: give the folder of images as --root")
    root = request.existing_root()
    folders = {"train": root / "train"} if (root / "train").is_dir() else {"train": root}
    for name in VALIDATION:
        if folders["train"] != root and (root / name).is_dir():
            folders.setdefault("val", root / name)
    wanted = [name for name in request.splits if name in folders]
    if request.explicit and wanted != list(request.splits):
        raise DataError(f"{root}: no folder val or test beside train in it")
    # Labels are numbers of training classes in both splits, so train is listed in any case.
    classes = _subfolders(folders["train"])
    return [_split(name, folders[name], root.resolve().name, classes) for name in wanted]


def _split(name: str, folder: Path, dataset: str, classes: tuple[str, ...]) -> Split:
    unknown = sorted(set(_subfolders(folder)) - set(classes))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: a class that the training folder does not have")
    files: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for label, class_name in enumerate(classes):
        if name != "train" and not (folder / class_name).is_dir():
            continue
        found = sorted(_images(folder, folder / class_name))
        if not found:
            raise DataError(f"{folder / class_name}: no image in this class folder")
        for file, size in found:
            digest.update(f"{file}\0{size}\0".encode("utf-8", "surrogateescape"))
            files.append(file)
        labels += [label] * len(found)
    return Split(
        dataset=dataset,
        name=name,
        classes=classes,
        labels=np.array(labels, np.int64),
        images=lambda which: Files(folder, [files[number] for number in which]),
        facts={"input": digest.hexdigest()},
        grouped=True,
    )


def _subfolders(folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    if not names:
        raise DataError(f"{folder}: no class folders in it (one folder per class is expected)")
    return tuple(sorted(names))


def _images(top: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Image files below ``folder`` as (path relative to ``top``, size)."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from _images(top, Path(entry.path))
                elif entry.name.lower().endswith(SUFFIXES):
                    yield os.path.relpath(entry.path, top), entry.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
