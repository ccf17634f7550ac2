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
    LeftOutEntry,
    SourceRequest,
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
from .webdataset_samples import Sample, TarSampleReader

_MIXED_LABELS_PROBLEM = "numbers and names are mixed"
_MAX_CLASSES_PER_SAMPLE = 10
_MAX_EXTRA_CLASSES = 10_000
"""Numbered classes may be this many times the labelled samples, and this many more."""
_OUR_FORMAT_PREFIX = FORMAT.partition("/")[0].encode() + b"/"
_MANIFEST_HEAD_BYTES = 1 << 12


def webdataset(request: SourceRequest) -> list[Split]:
    """Find the folders of a root that are splits, or take the tars of ``root`` as one split.

    ``root`` may also be a tar, or a pattern such as ``data/train-*.tar``.  Classes are those of
    all splits there are, so that a label means the same whichever are wanted.

    Raises:
        DataError: There is no tar, one is damaged, or its samples are not whole.
    """
    if request.root is None:
        raise DataError("--root is required: a folder of tars, a tar, or a pattern in quotes")
    tars_by_split, left_out = _find_split_tars(request.root, request)
    is_single_split = bool(find_tars(request.root))
    is_test_used_as_val = "val" in tars_by_split and (
        is_single_split or split_by_folder_name(tars_by_split["val"][0].parent.name) == "test"
    )
    split_names = select_splits(
        request.splits, request.has_named_splits, tars_by_split, is_test_used_as_val
    )
    if not split_names:
        raise DataError(
            f"{request.root}: no folder {describe_splits(request.splits)} with tars beside train "
            "in it"
        )
    readers = {name: TarSampleReader(tars, request) for name, tars in tars_by_split.items()}
    for reader in readers.values():
        reader.read()
    sound_samples_by_split = {
        name: [sample for sample in reader.samples if not sample.image.flaw]
        for name, reader in readers.items()
    }
    _refuse_mixed_labels(
        [sample for name in split_names for sample in sound_samples_by_split[name]]
    )
    labelled_samples = [
        sample
        for name in sound_samples_by_split
        for sample in sound_samples_by_split[name]
        if sample.label is not None
    ]
    _refuse_mixed_labels(labelled_samples)
    classes = _list_classes(labelled_samples, tars_by_split)
    splits = [
        _make_split(name, readers[name], classes, request.skip_unreadable) for name in split_names
    ]
    return [splits[0].with_left_out(left_out), *splits[1:]]


def _find_split_tars(
    root: Path, request: SourceRequest
) -> tuple[dict[str, list[Path]], list[LeftOutEntry]]:
    """Find the tars of each split, sorted by name, and what lies beside the splits."""
    tars = find_tars(root)
    if tars:
        # What a lone folder holds is what the user says it is; a test split alone is the val.
        name = request.splits[0]
        return {"val" if name == "test" else name: tars}, []
    folders = (
        find_split_folders(root, _holds_tars, request.skip_unreadable) if root.is_dir() else {}
    )
    if not folders:
        raise DataError(f"{root}: no .tar in it, nor in a folder train or val of it (--root)")
    return {name: find_tars(folder) for name, folder in folders.items()}, list_beside_splits(
        root, folders
    )


def _holds_tars(folder: Path) -> bool:
    return bool(find_tars(folder))


def _refuse_mixed_labels(samples: Sequence[Sample]) -> None:
    """Refuse samples whose labels are not all numbers, all names, or all absent."""
    for sample in samples:
        if type(sample.label) is not type(samples[0].label):
            pair = samples[0], sample
            label_texts = " and ".join(
                f"{sample.image.name} has {_label_text(sample.label)}" for sample in pair
            )
            is_label_missing = any(sample.label is None for sample in pair)
            problem = (
                "some samples have a label that others lack"
                if is_label_missing
                else _MIXED_LABELS_PROBLEM
            )
            raise DataError(f"{label_texts}: {problem}")


def _label_text(label: int | str | None) -> str:
    return "none" if label is None else f"the label {label!r:.40}"


def _list_classes(
    labelled_samples: Sequence[Sample], tars_by_split: dict[str, list[Path]]
) -> tuple[str, ...]:
    """List the names of all classes; a manifest beside the tars may name numbered ones."""
    names = sorted({sample.label for sample in labelled_samples if isinstance(sample.label, str)})
    if names or not labelled_samples:
        return tuple(names)
    numbers = [
        (sample.label, sample) for sample in labelled_samples if isinstance(sample.label, int)
    ]
    least_label, first = min(numbers, key=itemgetter(0))
    greatest_label, last = max(numbers, key=itemgetter(0))
    if least_label < UNLABELED:
        raise DataError(
            f"{_describe_sample_location(first)}: the label is {least_label}: labels are "
            "numbers from 0 on"
        )
    for folder in (tars[0].parent for tars in tars_by_split.values()):
        if (
            _is_our_manifest(folder / MANIFEST)
            and len(classes := read_manifest(folder).classes) > greatest_label
        ):
            return classes
    # A table of as many classes as a number says would take whatever memory there is.
    if greatest_label >= _MAX_CLASSES_PER_SAMPLE * len(labelled_samples) + _MAX_EXTRA_CLASSES:
        raise DataError(
            f"{_describe_sample_location(last)}: the label is {greatest_label}, but only "
            f"{len(labelled_samples)} samples have one: number the classes from 0 on, or give names"
        )
    return tuple(map(str, range(greatest_label + 1)))


def _describe_sample_location(sample: Sample) -> str:
    return f"{sample.tar}/{sample.image.name}"


def _is_our_manifest(manifest: Path) -> bool:
    """Tell whether a manifest is one of ours, whole or damaged: other tools write some, too."""
    if not manifest.is_file():
        return False
    with manifest.open("rb") as file:
        return _OUR_FORMAT_PREFIX in file.read(_MANIFEST_HEAD_BYTES)


def _make_split(
    name: str, reader: TarSampleReader, classes: tuple[str, ...], skip_unreadable: bool
) -> Split:
    tars = reader.tars
    samples = reader.samples
    if not samples:
        raise DataError(f"{tars[0]}: no sample in it, nor in the {len(tars) - 1} other tars")
    if all(sample.image.flaw for sample in samples) and skip_unreadable:
        reason = f"{samples[0].name}: {samples[0].image.flaw}"
        raise DataError(
            f"{reason}: not one of {len(samples)} samples in {tars[0].parent} can be used"
        )
    number_by_class = {class_name: number for number, class_name in enumerate(classes)}
    labels = [
        sample.label
        if isinstance(sample.label, int)
        else number_by_class.get(sample.label or "", UNLABELED)
        for sample in samples
    ]
    archived_images = ArchivedImages.from_members(
        reader.unpacked_paths,
        [(sample.tar_index, sample.image) for sample in samples],
        skip_unreadable,
    )
    digest = hashlib.sha256()
    for sample in samples:
        image = sample.image
        facts = f"{tars[sample.tar_index].name}\0{image.name}\0{image.size}\0{sample.label}\0"
        digest.update(facts.encode("utf-8", "surrogateescape"))
    tar_stamps = [reader.make_stamp(path) for path in tars]
    return Split(
        dataset="webdataset",
        name=name,
        classes=classes,
        labels=np.array(labels, np.int64),
        make_images=archived_images.select_rows,
        facts={"input": digest.hexdigest()},
        is_grouped_by_class=True,
        name_of=lambda number: samples[number].name,
        location=str(tars[0].parent),
        make_stamp=lambda numbers: "\n".join(
            tar_stamps[file] for file in np.unique(archived_images.file_numbers[numbers])
        ),
        left_out=reader.left_out,
        remark=reader.remark(),
    )
