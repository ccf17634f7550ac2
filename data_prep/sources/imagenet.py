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
    Member,
    file_stamp,
    holds_picture,
    iter_members,
)
from .base import (
    LeftOut,
    Request,
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

_SYNSET = re.compile(r"(?:\./)?(n\d{8})\.tar")
_VALIDATION = re.compile(r"(?:\./)?ILSVRC2012_val_(\d{8})\.JPEG")


def imagenet(request: Request) -> list[Split]:
    """The splits that are in ``root``, each as its archive or as an image folder.

    Without a devkit the classes are the training archive's, sorted; only the labels of the
    validation archive need it.

    Raises:
        DataError: A split or the devkit is missing, or an archive is damaged or another one.
    """
    root = request.existing_root()
    places = _places(root, request.skips)
    wanted = [name for name in request.splits if name in places]
    if not places or (request.explicit and wanted != list(request.splits)):
        missing = " or ".join(name for name in request.splits if name not in places)
        raise DataError(
            f"{root}: no {missing}: neither {TRAIN if missing != 'val' else VAL} nor a folder of "
            f"that name"
        )
    devkit = read_devkit(root) if "val" in wanted and not places["val"].is_dir() else None
    archives, others = _class_archives(places["train"]) if _archived(places, "train") else ([], [])
    known = _known(places, archives, devkit)
    classes = read_class_list(request.classes, known)
    made: list[Split] = []
    for name in wanted:
        if places[name].is_dir():
            refuse_unknown_classes(places[name], known)
            made.append(split_from_folder(DATASET, name, places[name], classes, request.skips))
        elif name == "train":
            made.append(_train(places["train"], archives, classes).besides(others))
        else:
            made.append(_val(places["val"], _labels(devkit, places["val"], known), classes))
    return [made[0].besides(_besides(root, places)), *made[1:]]


def _places(root: Path, skips: bool) -> dict[str, Path]:
    """Where the splits are, by name."""
    if root.is_file():
        return {"val" if root.name == VAL else "train": root}
    folders = find_split_folders(root, skips=skips)
    found: dict[str, Path] = {}
    for name, archive in (("train", TRAIN), ("val", VAL)):
        if (root / archive).is_file():
            found[name] = root / archive
        elif name in folders and split_by_folder_name(folders[name].name) == name:
            found[name] = folders[name]
    return found


def _besides(root: Path, places: dict[str, Path]) -> list[LeftOut]:
    """What lies in the root and is none of ImageNet's parts."""
    if root.is_file():
        return []
    parts = {name: root / name for name in (TRAIN, VAL, DEVKIT, DEVKIT_FOLDER)}
    folders = {name: root / name for name in ("train", "val")}
    return list_beside_splits(root, {**parts, **folders, **places})


def _archived(places: dict[str, Path], name: str) -> bool:
    return name in places and places[name].is_file()


def _known(
    places: dict[str, Path], archives: Sequence[tuple[str, Member]], devkit: Devkit | None
) -> tuple[str, ...]:
    """All classes there are: those of the training images, if there are any."""
    if archives:
        return tuple(sorted(synset for synset, _ in archives))
    if "train" in places:
        return list_classes(places["train"])
    return devkit.classes if devkit else list_classes(places["val"])


def _class_archives(archive: Path) -> tuple[list[tuple[str, Member]], list[LeftOut]]:
    """The synset and the place of every archive within the training archive, and what is none."""
    found: dict[str, Member] = {}
    left_out: list[LeftOut] = []
    for member in iter_members(archive):
        match = _SYNSET.fullmatch(member.name)
        if match is None and not is_tar(member.name) and not holds_picture(archive, member):
            left_out.append(LeftOut.file(member.name))
            continue
        if match is None or member.flaw or match[1] in found:
            reason = member.flaw or ("is in it twice" if match else "is no archive of a synset")
            raise DataError(f"{archive}: {member.name}: {reason}: fetch the official {TRAIN}")
        found[match[1]] = member
    if not found:
        reason = (
            f"{left_out[0].name}: is no archive of a synset" if left_out else "an empty archive"
        )
        raise DataError(f"{archive}: {reason}: fetch the official {TRAIN}")
    return list(found.items()), left_out


def _train(archive: Path, archives: Sequence[tuple[str, Member]], classes: Sequence[str]) -> Split:
    found: list[tuple[int, Member]] = []
    left_out: list[LeftOut] = []
    for synset, place in archives:
        if synset in classes:
            label, images = classes.index(synset), 0
            for member in iter_members(archive, place.offset, place.size):
                named = _renamed(member, synset)
                if holds_picture(archive, member):
                    images += 1
                    found.append((label, named))
                else:
                    left_out.append(LeftOut.file(named.name))
            if not images:
                raise DataError(f"{archive}: {place.name}: no image in this class archive")
    left_out.sort(key=lambda one: one.name)
    return _split("train", archive, found, classes).besides(left_out)


def _val(archive: Path, labels: Sequence[str], classes: Sequence[str]) -> Split:
    found: list[tuple[int, Member]] = []
    left_out: list[LeftOut] = []
    for member in iter_members(archive):
        match = _VALIDATION.fullmatch(member.name)
        if match is None and not holds_picture(archive, member):
            left_out.append(LeftOut.file(member.name))
            continue
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(labels):
            raise DataError(
                f"{archive}: {member.name}: none of the {len(labels)} images that {DEVKIT} knows"
            )
        synset = labels[number - 1]
        if synset in classes:
            found.append((classes.index(synset), _renamed(member, synset)))
    if not found and left_out:
        raise DataError(f"{archive}: {left_out[0].name}: no image in it: fetch the official {VAL}")
    return _split("val", archive, found, classes).besides(left_out)


def _labels(devkit: Devkit | None, archive: Path, known: Sequence[str]) -> Sequence[str]:
    """The synset of every validation image."""
    if devkit is None:
        raise DataError(
            f"{archive}: its labels are in {DEVKIT}, which is not beside it: put it there, or "
            "give a folder val of class folders instead, or shard --split train alone"
        )
    unknown = sorted(set(devkit.validation) - set(known))
    if unknown:
        raise DataError(f"{archive}: {unknown[0]}: a class that the training images do not have")
    return devkit.validation


def _renamed(member: Member, synset: str) -> Member:
    """As the file that unpacking by class gives."""
    name = f"{synset}/{member.name.removeprefix('./')}"
    return Member(name, member.offset, member.size, member.flaw)


def _split(
    name: str, archive: Path, found: list[tuple[int, Member]], classes: Sequence[str]
) -> Split:
    found.sort(key=lambda pair: pair[1].name)
    names = [member.name for _, member in found]
    for one, other in pairwise(names):
        if one == other:
            raise DataError(f"{archive}: {one} is in it twice: fetch the official archive")
    digest = hashlib.sha256()
    for _, member in found:
        digest.update(f"{member.name}\0{member.size}\0".encode("utf-8", "surrogateescape"))
    spans = ArchivedImages.of([archive], [(0, member) for _, member in found])
    unchanged = file_stamp(archive)
    return Split(
        dataset=DATASET,
        name=name,
        classes=tuple(classes),
        labels=np.array([label for label, _ in found], np.int64),
        images=spans.take,
        facts={"input": digest.hexdigest()},
        grouped=True,
        names=lambda number: names[number],
        where=str(archive),
        stamp=lambda which: unchanged,
    )
