"""A folder of class folders, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files import read_regular
from data_prep.sources.classlist import chosen
from data_prep.split import Raw, Request, Split
from data_prep.tars import MAX_BYTES
from vssl_dist.data.manifest import DataError

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp",
)  # fmt: skip
VALIDATION = ("val", "test")
"""Names under which the second split is looked for, in this order."""
_SPLITS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
)
_FLAWS = (errno.EINVAL, errno.EFBIG)
"""Reasons to leave out one file, rather than of a file system that has failed."""


@dataclass(frozen=True)
class Files:
    """Image files to read."""

    folder: Path
    names: Sequence[str]

    def __iter__(self) -> Iterator[Raw]:
        for name in self.names:
            path = self.folder / name
            try:
                raw = Raw(read_regular(path, MAX_BYTES), str(path))
            except OSError as error:
                if error.errno not in _FLAWS:
                    raise DataError(f"{path}: cannot be read ({error.strerror})") from error
                raw = Raw(b"", flaw=error.strerror or "unusable")
            yield raw


def imagefolder(request: Request) -> list[Split]:
    """``root/train`` and ``root/val`` (or ``test``), or ``root`` itself as training images.

    Raises:
        DataError: A folder is missing, unreadable, or without images.
    """
    root = request.existing_root()
    folders = {"train": root / "train"} if (root / "train").is_dir() else {"train": root}
    for name in VALIDATION:
        if folders["train"] != root and (root / name).is_dir():
            folders.setdefault("val", root / name)
    if folders["train"] == root:
        _refuse_splits(root)
    wanted = [name for name in request.splits if name in folders]
    if request.explicit and wanted != list(request.splits):
        raise DataError(f"{root}: no folder val or test beside train in it")
    # Labels are numbers of training classes in both splits, so train is listed in any case.
    known = subfolders(folders["train"])
    classes = chosen(request.classes, known)
    for name in wanted:
        refuse_unknown(folders[name], known)
    return [folder_split("imagefolder", name, folders[name], classes) for name in wanted]


def _refuse_splits(root: Path) -> None:
    """See that what lies in a root without ``train`` are classes, and not splits of other names."""
    names = subfolders(root)
    if not all(name.lower() in _SPLITS for name in names):
        return
    # A class may be called so as well, but then it has its images right in it.
    for name in (each for each in names if _holds_classes(root / each)):
        raise DataError(
            f"{root}: {name} looks like a split, and there is no train: call the folder of "
            "training images train, or give one folder of class folders as --root"
        )


def _holds_classes(folder: Path) -> bool:
    """Whether there are images in its folders, and none beside these."""
    beside = (path for path in folder.iterdir() if not path.name.startswith("."))
    if any(path.name.lower().endswith(SUFFIXES) for path in beside):
        return False
    return any(True for _ in _images(folder, folder))


def refuse_unknown(folder: Path, known: Sequence[str]) -> None:
    """See that every class folder is of a known class.

    Raises:
        DataError: One is not.
    """
    unknown = sorted(set(subfolders(folder)) - set(known))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: a class that the training folder does not have")


def folder_split(dataset: str, name: str, folder: Path, classes: tuple[str, ...]) -> Split:
    """A folder of class folders as a split.

    Args:
        dataset: What to call the data set.
        name: Of the split.
        folder: Holds a folder for each class.
        classes: Those to take, sorted; only a validation split may lack some.

    Raises:
        DataError: A folder is unreadable or without images.
    """
    files: list[str] = []
    labels: list[int] = []
    stamps: list[tuple[int, ...]] = []
    digest = hashlib.sha256()
    for label, class_name in enumerate(classes):
        if name != "train" and not (folder / class_name).is_dir():
            continue
        found = sorted(_images(folder, folder / class_name))
        if not found:
            raise DataError(f"{folder / class_name}: no image in this class folder")
        for file, facts in found:
            digest.update(f"{file}\0{facts[0]}\0".encode("utf-8", "surrogateescape"))
            files.append(file)
            stamps.append(facts)
        labels += [label] * len(found)
    table = np.array(stamps, np.int64).reshape(-1, 4)
    return Split(
        dataset=dataset,
        name=name,
        classes=classes,
        labels=np.array(labels, np.int64),
        images=lambda which: Files(folder, [files[number] for number in which]),
        facts={"input": digest.hexdigest()},
        grouped=True,
        names=lambda number: files[number],
        where=str(folder),
        stamp=lambda which: hashlib.sha256(table[which].tobytes()).hexdigest(),
    )


def subfolders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in a folder, sorted.

    Raises:
        DataError: It cannot be listed, or has none.
    """
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    if not names:
        raise DataError(f"{folder}: no class folders in it (one folder per class is expected)")
    return tuple(sorted(names))


def _images(top: Path, folder: Path) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Image files below ``folder`` as (path relative to ``top``, what changes with the file)."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from _images(top, Path(entry.path))
                elif entry.name.lower().endswith(SUFFIXES):
                    facts = entry.stat()
                    inode = facts.st_ino & (1 << 63) - 1  # some file systems use all 64 bits
                    changing = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, inode)
                    yield os.path.relpath(entry.path, top), changing
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
