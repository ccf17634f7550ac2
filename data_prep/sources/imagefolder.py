"""A folder of class folders, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vssl_dist.durable import read_regular
from vssl_dist.errors import DataError

from ..archives.tars import MAX_BYTES
from ..images.raw_image import RawImage
from .base import (
    LeftOut,
    Request,
    Split,
)
from .class_folders import (
    FileFacts,
    is_class_folder,
    list_classes,
    list_classless,
    walk_class_folder,
)
from .classlist import read_class_list
from .split_folders import (
    describe_left_out,
    describe_splits,
    find_split_folders,
    is_folder,
    list_beside_splits,
    list_names,
    select_splits,
    split_by_folder_name,
    unreadable_error,
)

_FLAWS = (errno.EINVAL, errno.EFBIG)
"""Reasons to leave out one file, rather than of a file system that has failed."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files to read."""

    folder: Path
    names: Sequence[str]
    skips: bool = False
    """Whether one that cannot be read is flawed, and not the end of the whole."""

    def __iter__(self) -> Iterator[RawImage]:
        for name in self.names:
            path = self.folder / name
            try:
                raw = RawImage(read_regular(path, MAX_BYTES), str(path))
            except OSError as error:
                if error.errno == errno.ENXIO:  # what opening a socket gives
                    raw = RawImage(b"", flaw="not a regular file")
                elif error.errno in _FLAWS:
                    raw = RawImage(b"", flaw=error.strerror or "unusable")
                elif self.skips:
                    flaw = f"cannot be read ({error.strerror})"
                    raw = RawImage(b"", str(path), flaw, asked_again=True)
                else:
                    raise unreadable_error(path, error) from error
            yield raw


def imagefolder(request: Request) -> list[Split]:
    """The folders of a root that are splits, or the root itself as training images.

    Raises:
        DataError: A folder is missing, unreadable, or without images.
    """
    root = request.existing_root()
    places, besides = {"train": root}, list[LeftOut]()
    if _has_training(root):
        places = find_split_folders(root, _may_be_split, request.skips)
        besides = list_beside_splits(root, places)
    else:
        _refuse_splits(root)
    # Labels are numbers of training classes in all splits, so train is listed in any case.
    known = list_classes(places["train"])
    if not request.explicit:
        for name in [name for name in places if _is_no_split(name, places[name], known)]:
            folder = places.pop(name)
            besides.append(
                describe_left_out(folder, f"../{folder.name}", "has no folders of known classes")
            )
    test_serves = "val" in places and split_by_folder_name(places["val"].name) == "test"
    wanted = select_splits(request.splits, request.explicit, places, test_serves)
    if not wanted:
        raise DataError(f"{root}: no folder {describe_splits(request.splits)} beside train in it")
    classes = read_class_list(request.classes, known)
    for name in wanted:
        refuse_unknown_classes(places[name], known)
    made = [split_from_folder("imagefolder", n, places[n], classes, request.skips) for n in wanted]
    return [made[0].besides(besides), *made[1:]]


def _has_training(root: Path) -> bool:
    """Whether a root holds splits: without one to train on, they are classes of such names."""
    names = [name for name in list_names(root) if split_by_folder_name(name) == "train"]
    return any(is_folder(root / name) and _may_be_split(root / name) for name in names)


def _may_be_split(folder: Path) -> bool:
    """Whether a folder is a split by more than its name: ``training`` may be a class, too."""
    if split_by_folder_name(folder.name) != "train" or folder.name == "train":
        return True
    others = [
        name
        for name in list_names(folder.parent)
        if split_by_folder_name(name) not in ("", "train")
    ]
    return any(is_folder(folder.parent / name) for name in others) or any(
        is_folder(folder / name) for name in list_names(folder)
    )


def _is_no_split(name: str, folder: Path, known: Sequence[str]) -> bool:
    """Whether a folder has only the name of a split: a third one may be without labels."""
    if name == "train" or not set(known).isdisjoint(list_names(folder)):
        return False
    return name == "test" or not walk_class_folder(folder.parent, folder.name, skips=True).images


def _refuse_splits(root: Path) -> None:
    """See that what lies in a root without ``train`` are classes, and not splits."""
    names = list_classes(root)
    inner = root / names[0]
    if (
        len(names) == 1
        and _has_training(inner)
        and _holds_classes(find_split_folders(inner)["train"])
    ):
        told = f"its only folder {names[0]} holds the splits"
        raise DataError(f"{root}: {told}: give {inner} as --root")
    if not all(split_by_folder_name(name) for name in names):
        return
    # A class may be called so as well, but then it has its images right in it.
    for name in (each for each in names if _holds_classes(root / each)):
        raise DataError(
            f"{root}: {name} looks like a split, and there is no train: call the folder of "
            "training images train, or give one folder of class folders as --root"
        )


def _holds_classes(folder: Path) -> bool:
    """Whether there are images in its folders, and none beside these."""
    images = [name for name, _ in walk_class_folder(folder.parent, folder.name, skips=True).images]
    return bool(images) and all(name.count("/") > 1 for name in images)


def refuse_unknown_classes(folder: Path, known: Sequence[str]) -> None:
    """See that every class folder is of a known class.

    Raises:
        DataError: One is not.
    """
    unknown = sorted(set(list_classes(folder)) - set(known))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: a class that the training folder does not have")


def split_from_folder(
    dataset: str, name: str, folder: Path, classes: tuple[str, ...], skips: bool = False
) -> Split:
    """A folder of class folders as a split.

    Args:
        dataset: What to call the data set.
        name: Of the split.
        folder: Holds a folder for each class.
        classes: Those to take, sorted; only a split that is not trained on may lack some.
        skips: Whether what cannot be read is left out, and does not end it.

    Raises:
        DataError: A folder is unreadable or without images.
    """
    files: list[str] = []
    labels: list[int] = []
    stamps: list[FileFacts] = []
    left_out = list_classless(folder, skips)
    digest = hashlib.sha256()
    for label, class_name in enumerate(classes):
        if name != "train" and not is_class_folder(folder / class_name):
            continue
        walk = walk_class_folder(folder, class_name, skips)
        if not walk.images:
            raise DataError(f"{folder / class_name}: no image in this class folder")
        for file, facts in walk.images:
            digest.update(f"{file}\0{facts[0]}\0".encode("utf-8", "surrogateescape"))
            files.append(file)
            stamps.append(facts)
        labels += [label] * len(walk.images)
        left_out += walk.left_out
    table = np.array(stamps, np.int64).reshape(-1, 4)
    return Split(
        dataset=dataset,
        name=name,
        classes=classes,
        labels=np.array(labels, np.int64),
        images=lambda which: ImageFiles(folder, [files[number] for number in which], skips),
        facts={"input": digest.hexdigest()},
        grouped=True,
        names=lambda number: files[number],
        where=str(folder),
        stamp=lambda which: hashlib.sha256(table[which].tobytes()).hexdigest(),
        left_out=left_out,
    )
