"""Any WebDataset: tars whose neighbouring members of one key are a sample.

The image is the member that is called one, or else the one that begins like one.  Labels come
from a ``.cls`` member or from the ``label``, ``cls`` or ``class`` of a ``.json`` one, as numbers
or as names; a dataset without them is taken without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from vssl_dist.data.store.manifest import FORMAT, MANIFEST, read_manifest
from vssl_dist.errors import DataError

from ..archives.archived_images import ArchivedImages
from .base import (
    UNLABELED,
    LeftOut,
    Request,
    Split,
)
from .split_folders import (
    describe_splits,
    find_split_folders,
    list_beside_splits,
    select_splits,
    split_by_folder_name,
)
from .tarlist import find_tars
from .webdataset_samples import Sample, SampleReader

_MIXED = "numbers and names are mixed"
_SPARSE, _FEW = 10, 10_000
"""So many times as many classes as samples, and these besides, may be without a sample."""
_OUR_FORMAT = FORMAT.partition("/")[0].encode() + b"/"
_HEAD = 1 << 12


def webdataset(request: Request) -> list[Split]:
    """The folders of a root that are splits, or the tars of ``root`` as one split.

    ``root`` may also be a tar, or a pattern such as ``data/train-*.tar``.  Classes are those of
    all splits there are, so that a label means the same whichever are wanted.

    Raises:
        DataError: There is no tar, one is damaged, or its samples are not whole.
    """
    if request.root is None:
        raise DataError("--root is required: a folder of tars, a tar, or a pattern in quotes")
    places, besides = _places(request.root, request)
    lone = bool(find_tars(request.root))
    test_serves = "val" in places and (
        lone or split_by_folder_name(places["val"][0].parent.name) == "test"
    )
    wanted = select_splits(request.splits, request.explicit, places, test_serves)
    if not wanted:
        raise DataError(
            f"{request.root}: no folder {describe_splits(request.splits)} with tars beside train "
            "in it"
        )
    readers = {name: SampleReader(tars, request) for name, tars in places.items()}
    for reader in readers.values():
        reader.read()
    sound = {
        name: [one for one in reader.samples if not one.image.flaw]
        for name, reader in readers.items()
    }
    _check_one_kind([one for name in wanted for one in sound[name]])
    labelled = [one for name in sound for one in sound[name] if one.label is not None]
    _check_one_kind(labelled)
    classes = _classes(labelled, places)
    made = [_split(name, readers[name], classes, request.skips) for name in wanted]
    return [made[0].besides(besides), *made[1:]]


def _places(root: Path, request: Request) -> tuple[dict[str, list[Path]], list[LeftOut]]:
    """The tars of each split, sorted by name, and what lies beside the splits."""
    tars = find_tars(root)
    if tars:
        # What a lone folder holds is what the user says it is; a test split alone is the val.
        name = request.splits[0]
        return {"val" if name == "test" else name: tars}, []
    folders = find_split_folders(root, _holds_tars, request.skips) if root.is_dir() else {}
    if not folders:
        raise DataError(f"{root}: no .tar in it, nor in a folder train or val of it (--root)")
    return {name: find_tars(folder) for name, folder in folders.items()}, list_beside_splits(
        root, folders
    )


def _holds_tars(folder: Path) -> bool:
    return bool(find_tars(folder))


def _check_one_kind(samples: Sequence[Sample]) -> None:
    """See that all labels are numbers, or all names, or that there are none."""
    for one in samples:
        if type(one.label) is not type(samples[0].label):
            pair = samples[0], one
            told = " and ".join(f"{each.image.name} has {_told(each.label)}" for each in pair)
            lacking = any(each.label is None for each in pair)
            what = "some samples have a label that others lack" if lacking else _MIXED
            raise DataError(f"{told}: {what}")


def _told(label: int | str | None) -> str:
    return "none" if label is None else f"the label {label!r:.40}"


def _classes(labelled: Sequence[Sample], places: dict[str, list[Path]]) -> tuple[str, ...]:
    """The names of all labels; numbers are named by a manifest beside the tars, or themselves."""
    names = sorted({one.label for one in labelled if isinstance(one.label, str)})
    if names or not labelled:
        return tuple(names)
    numbers = [(one.label, one) for one in labelled if isinstance(one.label, int)]
    least, first = min(numbers, key=itemgetter(0))
    most, last = max(numbers, key=itemgetter(0))
    if least < UNLABELED:
        raise DataError(f"{_place(first)}: the label is {least}: labels are numbers from 0 on")
    for folder in (tars[0].parent for tars in places.values()):
        if _is_ours(folder / MANIFEST) and len(known := read_manifest(folder).classes) > most:
            return known
    # A table of as many classes as a number says would take whatever memory there is.
    if most >= _SPARSE * len(labelled) + _FEW:
        raise DataError(
            f"{_place(last)}: the label is {most}, but only {len(labelled)} samples have one: "
            "number the classes from 0 on, or give names"
        )
    return tuple(map(str, range(most + 1)))


def _place(sample: Sample) -> str:
    return f"{sample.tar}/{sample.image.name}"


def _is_ours(manifest: Path) -> bool:
    """Whether there is a manifest of shards, whole or damaged: other tools write some, too."""
    if not manifest.is_file():
        return False
    with manifest.open("rb") as file:
        return _OUR_FORMAT in file.read(_HEAD)


def _split(name: str, reader: SampleReader, classes: tuple[str, ...], skips: bool) -> Split:
    tars, found = reader.tars, reader.samples
    if not found:
        raise DataError(f"{tars[0]}: no sample in it, nor in the {len(tars) - 1} other tars")
    if all(sample.image.flaw for sample in found) and skips:
        told = f"{found[0].name}: {found[0].image.flaw}"
        raise DataError(f"{told}: not one of {len(found)} samples in {tars[0].parent} can be used")
    numbers = {text: number for number, text in enumerate(classes)}
    labels = [
        sample.label
        if isinstance(sample.label, int)
        else numbers.get(sample.label or "", UNLABELED)
        for sample in found
    ]
    spans = ArchivedImages.of(
        reader.read_at, [(sample.file, sample.image) for sample in found], skips
    )
    digest = hashlib.sha256()
    for sample in found:
        facts = (
            f"{tars[sample.file].name}\0{sample.image.name}\0{sample.image.size}\0{sample.label}\0"
        )
        digest.update(facts.encode("utf-8", "surrogateescape"))
    unchanged = [reader.stamp_of(path) for path in tars]
    return Split(
        dataset="webdataset",
        name=name,
        classes=classes,
        labels=np.array(labels, np.int64),
        images=spans.take,
        facts={"input": digest.hexdigest()},
        grouped=True,
        names=lambda number: found[number].name,
        where=str(tars[0].parent),
        stamp=lambda which: "\n".join(unchanged[file] for file in np.unique(spans.file[which])),
        left_out=reader.left_out,
        remark=reader.remark(),
    )
