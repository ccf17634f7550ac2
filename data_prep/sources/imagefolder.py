"""A folder of class folders, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vssl_dist.durable import read_regular_file
from vssl_dist.errors import DataError

from ..archives.tars import MAX_BYTES
from ..images.raw_image import RawImage
from .base import (
    LeftOutEntry,
    SourceRequest,
    Split,
)
from .class_folders import (
    FileStamp,
    is_class_folder,
    list_classes,
    list_outside_classes,
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

_SINGLE_FILE_ERRNOS = (errno.EINVAL, errno.EFBIG)
"""Errors of a single file, rather than of a file system that has failed."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files, read when iterated."""

    folder: Path
    names: Sequence[str]
    skip_unreadable: bool = False
    """Whether a file that cannot be read is a flawed image instead of an error."""

    def __iter__(self) -> Iterator[RawImage]:
        for name in self.names:
            path = self.folder / name
            try:
                raw_image = RawImage(read_regular_file(path, MAX_BYTES), str(path))
            except OSError as error:
                if error.errno == errno.ENXIO:  # what opening a socket gives
                    raw_image = RawImage(b"", flaw="not a regular file")
                elif error.errno in _SINGLE_FILE_ERRNOS:
                    raw_image = RawImage(b"", flaw=error.strerror or "unusable")
                elif self.skip_unreadable:
                    flaw = f"cannot be read ({error.strerror})"
                    raw_image = RawImage(b"", str(path), flaw, may_be_read_later=True)
                else:
                    raise unreadable_error(path, error) from error
            yield raw_image


def imagefolder(request: SourceRequest) -> list[Split]:
    """Find the folders of a root that are splits, or take the root itself as training images.

    Raises:
        DataError: A folder is missing, unreadable, or without images.
    """
    root = request.require_root()
    folders = {"train": root}
    left_out: list[LeftOutEntry] = []
    if _has_training_split(root):
        folders = find_split_folders(root, _may_be_split, request.skip_unreadable)
        left_out = list_beside_splits(root, folders)
    else:
        _refuse_splits(root)
    # Labels are numbers of training classes in all splits, so train is listed in any case.
    known_classes = list_classes(folders["train"])
    if not request.has_named_splits:
        for name in [name for name in folders if _is_no_split(name, folders[name], known_classes)]:
            folder = folders.pop(name)
            left_out.append(
                describe_left_out(folder, f"../{folder.name}", "has no folders of known classes")
            )
    is_test_used_as_val = "val" in folders and split_by_folder_name(folders["val"].name) == "test"
    split_names = select_splits(
        request.splits, request.has_named_splits, folders, is_test_used_as_val
    )
    if not split_names:
        raise DataError(f"{root}: no folder {describe_splits(request.splits)} beside train in it")
    classes = read_class_list(request.classes, known_classes)
    for name in split_names:
        refuse_unknown_classes(folders[name], known_classes)
    splits = [
        split_from_folder("imagefolder", name, folders[name], classes, request.skip_unreadable)
        for name in split_names
    ]
    return [splits[0].with_left_out(left_out), *splits[1:]]


def _has_training_split(root: Path) -> bool:
    """Tell whether a root holds splits: without one to train on, they are classes of such names."""
    names = [name for name in list_names(root) if split_by_folder_name(name) == "train"]
    return any(is_folder(root / name) and _may_be_split(root / name) for name in names)


def _may_be_split(folder: Path) -> bool:
    """Tell whether a folder is a split by more than its name: ``training`` may be a class, too."""
    if split_by_folder_name(folder.name) != "train" or folder.name == "train":
        return True
    other_splits = [
        name
        for name in list_names(folder.parent)
        if split_by_folder_name(name) not in ("", "train")
    ]
    return any(is_folder(folder.parent / name) for name in other_splits) or any(
        is_folder(folder / name) for name in list_names(folder)
    )


def _is_no_split(name: str, folder: Path, known_classes: Sequence[str]) -> bool:
    """Tell whether a folder has only the name of a split, as a third one without labels may."""
    if name == "train" or not set(known_classes).isdisjoint(list_names(folder)):
        return False
    return (
        name == "test"
        or not walk_class_folder(folder.parent, folder.name, skip_unreadable=True).images
    )


def _refuse_splits(root: Path) -> None:
    """Refuse a root without ``train`` whose folders are splits, and not classes."""
    names = list_classes(root)
    only_folder = root / names[0]
    if (
        len(names) == 1
        and _has_training_split(only_folder)
        and _holds_classes(find_split_folders(only_folder)["train"])
    ):
        reason = f"its only folder {names[0]} holds the splits"
        raise DataError(f"{root}: {reason}: give {only_folder} as --root")
    if not all(split_by_folder_name(name) for name in names):
        return
    # A class may be called so as well, but then it has its images right in it.
    for name in (name for name in names if _holds_classes(root / name)):
        raise DataError(
            f"{root}: {name} looks like a split, and there is no train: call the folder of "
            "training images train, or give one folder of class folders as --root"
        )


def _holds_classes(folder: Path) -> bool:
    """Tell whether a folder has images in its folders, and none beside these."""
    images = [
        name
        for name, _ in walk_class_folder(folder.parent, folder.name, skip_unreadable=True).images
    ]
    return bool(images) and all(name.count("/") > 1 for name in images)


def refuse_unknown_classes(folder: Path, known_classes: Sequence[str]) -> None:
    """Refuse class folders that are of no known class.

    Raises:
        DataError: A class folder is of no known class.
    """
    unknown = sorted(set(list_classes(folder)) - set(known_classes))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: a class that the training folder does not have")


def split_from_folder(
    dataset: str, name: str, folder: Path, classes: tuple[str, ...], skip_unreadable: bool = False
) -> Split:
    """Make a split of a folder of class folders.

    Args:
        dataset: What to call the data set.
        name: Name of the split.
        folder: Folder that holds a folder for each class.
        classes: Classes to take, sorted; only a split that is not trained on may lack some.
        skip_unreadable: Whether what cannot be read is left out instead of being an error.

    Raises:
        DataError: A folder is unreadable or without images.
    """
    files: list[str] = []
    labels: list[int] = []
    file_facts: list[FileStamp] = []
    left_out = list_outside_classes(folder, skip_unreadable)
    digest = hashlib.sha256()
    for label, class_name in enumerate(classes):
        if name != "train" and not is_class_folder(folder / class_name):
            continue
        walk = walk_class_folder(folder, class_name, skip_unreadable)
        if not walk.images:
            raise DataError(f"{folder / class_name}: no image in this class folder")
        for file, facts in walk.images:
            digest.update(f"{file}\0{facts[0]}\0".encode("utf-8", "surrogateescape"))
            files.append(file)
            file_facts.append(facts)
        labels += [label] * len(walk.images)
        left_out += walk.left_out
    facts_table = np.array(file_facts, np.int64).reshape(-1, 4)
    return Split(
        dataset=dataset,
        name=name,
        classes=classes,
        labels=np.array(labels, np.int64),
        make_images=lambda numbers: ImageFiles(
            folder, [files[number] for number in numbers], skip_unreadable
        ),
        facts={"input": digest.hexdigest()},
        is_grouped_by_class=True,
        name_of=lambda number: files[number],
        location=str(folder),
        make_stamp=lambda numbers: hashlib.sha256(facts_table[numbers].tobytes()).hexdigest(),
        left_out=left_out,
    )
