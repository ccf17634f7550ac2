"""ImageNet-1K from the official archives of ILSVRC 2012, in place, or from image folders.

What is written depends on the images only: the archives and the folders that they unpack to
give the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from vssl_dist.errors import DataError

from ..archives.archived_images import ArchivedImages
from ..archives.tars import (
    ArchiveMember,
    file_stamp,
    holds_picture,
    iter_members,
)
from .base import (
    LeftOutEntry,
    SourceRequest,
    Split,
)
from .class_folders import list_classes
from .classlist import read_class_list
from .devkit import ARCHIVE as DEVKIT
from .devkit import FOLDER as DEVKIT_FOLDER
from .devkit import Devkit, read_devkit
from .imagefolder import refuse_unknown_classes, split_from_folder
from .split_folders import find_split_folders, list_beside_splits, split_by_folder_name
from .tarlist import is_tar

DATASET = "imagenet"
TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"

_SYNSET_TAR_PATTERN = re.compile(r"(?:\./)?(n\d{8})\.tar")
_VALIDATION_IMAGE_PATTERN = re.compile(r"(?:\./)?ILSVRC2012_val_(\d{8})\.JPEG")


def imagenet(request: SourceRequest) -> list[Split]:
    """Find the splits in ``root``, each as its archive or as an image folder.

    Without a devkit the classes are the training archive's, sorted; only the labels of the
    validation archive need it.

    Raises:
        DataError: A split or the devkit is missing, or an archive is damaged or another one.
    """
    root = request.require_root()
    split_paths = _find_split_paths(root, request.skip_unreadable)
    split_names = [name for name in request.splits if name in split_paths]
    if not split_paths or (request.has_named_splits and split_names != list(request.splits)):
        missing_text = " or ".join(name for name in request.splits if name not in split_paths)
        raise DataError(
            f"{root}: no {missing_text}: neither {TRAIN if missing_text != 'val' else VAL} nor a "
            "folder of that name"
        )
    devkit = read_devkit(root) if "val" in split_names and not split_paths["val"].is_dir() else None
    class_archives, left_out = (
        _list_class_archives(split_paths["train"])
        if _is_archived(split_paths, "train")
        else ([], [])
    )
    known_classes = _list_known_classes(split_paths, class_archives, devkit)
    classes = read_class_list(request.classes, known_classes)
    splits: list[Split] = []
    for name in split_names:
        if split_paths[name].is_dir():
            refuse_unknown_classes(split_paths[name], known_classes)
            splits.append(
                split_from_folder(
                    DATASET, name, split_paths[name], classes, request.skip_unreadable
                )
            )
        elif name == "train":
            train_split = _read_train(split_paths["train"], class_archives, classes)
            splits.append(train_split.with_left_out(left_out))
        else:
            labels = _validation_labels(devkit, split_paths["val"], known_classes)
            splits.append(_read_val(split_paths["val"], labels, classes))
    return [splits[0].with_left_out(_list_root_left_out(root, split_paths)), *splits[1:]]


def _find_split_paths(root: Path, skip_unreadable: bool) -> dict[str, Path]:
    """Find the archive or folder of each split, by its name."""
    if root.is_file():
        return {"val" if root.name == VAL else "train": root}
    folders = find_split_folders(root, skip_unreadable=skip_unreadable)
    split_paths: dict[str, Path] = {}
    for name, archive in (("train", TRAIN), ("val", VAL)):
        if (root / archive).is_file():
            split_paths[name] = root / archive
        elif name in folders and split_by_folder_name(folders[name].name) == name:
            split_paths[name] = folders[name]
    return split_paths


def _list_root_left_out(root: Path, split_paths: dict[str, Path]) -> list[LeftOutEntry]:
    """List what lies in the root and is none of ImageNet's files."""
    if root.is_file():
        return []
    official_paths = {name: root / name for name in (TRAIN, VAL, DEVKIT, DEVKIT_FOLDER)}
    folders = {name: root / name for name in ("train", "val")}
    return list_beside_splits(root, {**official_paths, **folders, **split_paths})


def _is_archived(split_paths: dict[str, Path], name: str) -> bool:
    return name in split_paths and split_paths[name].is_file()


def _list_known_classes(
    split_paths: dict[str, Path],
    class_archives: Sequence[tuple[str, ArchiveMember]],
    devkit: Devkit | None,
) -> tuple[str, ...]:
    """List all classes there are: those of the training images, if there are any."""
    if class_archives:
        return tuple(sorted(synset for synset, _ in class_archives))
    if "train" in split_paths:
        return list_classes(split_paths["train"])
    return devkit.classes if devkit else list_classes(split_paths["val"])


def _list_class_archives(
    archive: Path,
) -> tuple[list[tuple[str, ArchiveMember]], list[LeftOutEntry]]:
    """List synset and member of every archive within the training archive, and the rest."""
    synset_members: dict[str, ArchiveMember] = {}
    left_out: list[LeftOutEntry] = []
    for member in iter_members(archive):
        name_match = _SYNSET_TAR_PATTERN.fullmatch(member.name)
        if name_match is None and not is_tar(member.name) and not holds_picture(archive, member):
            left_out.append(LeftOutEntry.file(member.name))
            continue
        if name_match is None or member.flaw or name_match[1] in synset_members:
            reason = member.flaw or (
                "is in it twice" if name_match else "is no archive of a synset"
            )
            raise DataError(f"{archive}: {member.name}: {reason}: fetch the official {TRAIN}")
        synset_members[name_match[1]] = member
    if not synset_members:
        reason = (
            f"{left_out[0].name}: is no archive of a synset" if left_out else "an empty archive"
        )
        raise DataError(f"{archive}: {reason}: fetch the official {TRAIN}")
    return list(synset_members.items()), left_out


def _read_train(
    archive: Path, class_archives: Sequence[tuple[str, ArchiveMember]], classes: Sequence[str]
) -> Split:
    labelled_members: list[tuple[int, ArchiveMember]] = []
    left_out: list[LeftOutEntry] = []
    for synset, class_archive in class_archives:
        if synset in classes:
            label, picture_count = classes.index(synset), 0
            for member in iter_members(archive, class_archive.offset, class_archive.size):
                class_member = _rename_by_class(member, synset)
                if holds_picture(archive, member):
                    picture_count += 1
                    labelled_members.append((label, class_member))
                else:
                    left_out.append(LeftOutEntry.file(class_member.name))
            if not picture_count:
                raise DataError(f"{archive}: {class_archive.name}: no image in this class archive")
    left_out.sort(key=lambda entry: entry.name)
    return _make_split("train", archive, labelled_members, classes).with_left_out(left_out)


def _read_val(archive: Path, labels: Sequence[str], classes: Sequence[str]) -> Split:
    labelled_members: list[tuple[int, ArchiveMember]] = []
    left_out: list[LeftOutEntry] = []
    for member in iter_members(archive):
        name_match = _VALIDATION_IMAGE_PATTERN.fullmatch(member.name)
        if name_match is None and not holds_picture(archive, member):
            left_out.append(LeftOutEntry.file(member.name))
            continue
        number = int(name_match[1]) if name_match else 0
        if not 1 <= number <= len(labels):
            raise DataError(
                f"{archive}: {member.name}: none of the {len(labels)} images that {DEVKIT} knows"
            )
        synset = labels[number - 1]
        if synset in classes:
            labelled_members.append((classes.index(synset), _rename_by_class(member, synset)))
    if not labelled_members and left_out:
        raise DataError(f"{archive}: {left_out[0].name}: no image in it: fetch the official {VAL}")
    return _make_split("val", archive, labelled_members, classes).with_left_out(left_out)


def _validation_labels(
    devkit: Devkit | None, archive: Path, known_classes: Sequence[str]
) -> Sequence[str]:
    """Return the synset of every validation image."""
    if devkit is None:
        raise DataError(
            f"{archive}: its labels are in {DEVKIT}, which is not beside it: put it there, or "
            "give a folder val of class folders instead, or shard --split train alone"
        )
    unknown = sorted(set(devkit.validation_synsets) - set(known_classes))
    if unknown:
        raise DataError(f"{archive}: {unknown[0]}: a class that the training images do not have")
    return devkit.validation_synsets


def _rename_by_class(member: ArchiveMember, synset: str) -> ArchiveMember:
    """Rename a member to the file that unpacking by class gives."""
    name = f"{synset}/{member.name.removeprefix('./')}"
    return ArchiveMember(name, member.offset, member.size, member.flaw)


def _make_split(
    name: str,
    archive: Path,
    labelled_members: list[tuple[int, ArchiveMember]],
    classes: Sequence[str],
) -> Split:
    labelled_members.sort(key=lambda pair: pair[1].name)
    names = [member.name for _, member in labelled_members]
    for first, second in pairwise(names):
        if first == second:
            raise DataError(f"{archive}: {first} is in it twice: fetch the official archive")
    digest = hashlib.sha256()
    for _, member in labelled_members:
        digest.update(f"{member.name}\0{member.size}\0".encode("utf-8", "surrogateescape"))
    archived_images = ArchivedImages.from_members(
        [archive], [(0, member) for _, member in labelled_members]
    )
    archive_stamp = file_stamp(archive)
    return Split(
        dataset=DATASET,
        name=name,
        classes=tuple(classes),
        labels=np.array([label for label, _ in labelled_members], np.int64),
        make_images=archived_images.select_rows,
        facts={"input": digest.hexdigest()},
        is_grouped_by_class=True,
        name_of=lambda number: names[number],
        location=str(archive),
        make_stamp=lambda numbers: archive_stamp,
    )
