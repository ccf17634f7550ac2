"""Any WebDataset: tars whose neighbouring members of one key are a sample.

Labels come from a ``.cls`` member or from the ``label``, ``cls`` or ``class`` of a ``.json``
one, as numbers or as names; a dataset without them is taken without.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from data_prep.sources.imagefolder import SUFFIXES, VALIDATION
from data_prep.split import UNLABELED, Request, Split
from data_prep.tars import Member, Spans, members, stamp
from vssl_dist.data.manifest import FORMAT, MANIFEST, DataError, read_manifest

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MIXED = "numbers and names are mixed"
_JSON_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 1 << 20
_SPARSE, _FEW = 10, 10_000
"""So many times as many classes as samples, and these besides, may be without a sample."""
_OUR_FORMAT = FORMAT.partition("/")[0].encode() + b"/"
_HEAD = 1 << 12


@dataclass(frozen=True)
class _Sample:
    tar: Path
    file: int
    image: Member
    label: int | str | None


def webdataset(request: Request) -> list[Split]:
    """``root/train`` and ``root/val`` (or ``test``), or the tars of ``root`` as one split.

    ``root`` may also be a tar, or a pattern such as ``data/train-*.tar``.  Classes are those of
    all splits there are, so that a label means the same whichever are wanted.

    Raises:
        DataError: There is no tar, one is damaged, or its samples are not whole.
    """
    if request.root is None:
        raise DataError("--root is required: a folder of tars, a tar, or a pattern in quotes")
    places = _places(request.root, request)
    wanted = [name for name in request.splits if name in places]
    if not wanted or (request.explicit and wanted != list(request.splits)):
        raise DataError(f"{request.root}: no folder val or test with tars beside train in it")
    found = {name: list(_samples(tars)) for name, tars in places.items()}
    sound = {name: [one for one in found[name] if not one.image.flaw] for name in found}
    _check_one_kind([one for name in wanted for one in sound[name]])
    labelled = [one for name in sound for one in sound[name] if one.label is not None]
    _check_one_kind(labelled)
    classes = _classes(labelled, places)
    return [_split(name, places[name], found[name], classes) for name in wanted]


def _places(root: Path, request: Request) -> dict[str, list[Path]]:
    """The tars of each split, sorted by name."""
    tars = _tars(root)
    if tars:
        # What a lone folder holds is what the user says it is.
        return {request.splits[0]: tars}
    found = {"train": _tars(root / "train")}
    for name in VALIDATION:
        if tars := _tars(root / name):
            found.setdefault("val", tars)
    found = {name: tars for name, tars in found.items() if tars}
    if not found:
        raise DataError(f"{root}: no .tar in it, nor in a folder train or val of it (--root)")
    return found


def _tars(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    folder, pattern = (root, "*.tar") if root.is_dir() else (root.parent, root.name)
    try:
        return sorted(path for path in folder.glob(pattern) if path.is_file())
    except ValueError as error:
        raise DataError(f"{root}: not a pattern ({error}): use * for a part of a name") from error


def _samples(tars: Sequence[Path]) -> Iterator[_Sample]:
    for number, path in enumerate(tars):
        seen: set[str] = set()
        keyed = ((_KEY.fullmatch(member.name), member) for member in members(path))
        named = ((match[1], match[2].lower(), member) for match, member in keyed if match)
        for key, group in groupby(named, key=lambda one: one[0]):
            if key in seen:
                raise DataError(
                    f"{path}: the members of {key!r} do not lie together, or it is there twice: "
                    "write the archive sorted by name"
                )
            seen.add(key)
            parts = [(extension, member) for _, extension, member in group]
            if len({extension for extension, _ in parts}) < len(parts):
                raise DataError(f"{path}: {key!r} has two members of one kind: write it anew")
            image = _image(path, key, parts)
            # What is left out for its image need not have a label that can be read.
            label = None if image.flaw else _label(path, key, dict(parts))
            yield _Sample(path, number, image, label)


def _image(path: Path, key: str, parts: list[tuple[str, Member]]) -> Member:
    images = [member for extension, member in parts if f".{extension}" in SUFFIXES]
    if len(images) > 1:
        names = " and ".join(member.name for member in images)
        raise DataError(f"{path}: {key!r} has more than one image ({names})")
    return images[0] if images else Member(key, 0, 0, "a sample without an image")


def _label(path: Path, key: str, parts: dict[str, Member]) -> int | str | None:
    try:
        if "cls" in parts:
            return _number_or_name(_bytes(path, parts["cls"]).decode().strip())
        if "json" in parts:
            return _told_in(json.loads(_bytes(path, parts["json"])))
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: the label of {key!r} cannot be read ({reason})") from error
    return None


def _told_in(told: object) -> int | str | None:
    """The label that a ``.json`` member states; null states none."""
    values = [told.get(name) for name in _JSON_KEYS] if isinstance(told, dict) else []
    value = next((each for each in values if each is not None), None)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r:.40} is neither a whole number nor a name")
    return _number_or_name(str(value))


def _number_or_name(text: str) -> int | str:
    if not text:
        raise ValueError("it is empty")
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


def _bytes(path: Path, member: Member) -> bytes:
    if member.flaw or member.size > _MAX_LABEL_BYTES:
        raise ValueError(member.flaw or f"{member.size} bytes")
    with path.open("rb") as file:
        return os.pread(file.fileno(), member.size, member.offset)


def _check_one_kind(samples: Sequence[_Sample]) -> None:
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


def _classes(labelled: Sequence[_Sample], places: dict[str, list[Path]]) -> tuple[str, ...]:
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


def _place(sample: _Sample) -> str:
    return f"{sample.tar}/{sample.image.name}"


def _is_ours(manifest: Path) -> bool:
    """Whether there is a manifest of shards, whole or damaged: other tools write some, too."""
    if not manifest.is_file():
        return False
    with manifest.open("rb") as file:
        return _OUR_FORMAT in file.read(_HEAD)


def _split(name: str, tars: list[Path], found: list[_Sample], classes: tuple[str, ...]) -> Split:
    if not found:
        raise DataError(f"{tars[0]}: no sample in it, nor in the {len(tars) - 1} other tars")
    numbers = {text: number for number, text in enumerate(classes)}
    labels = [
        sample.label
        if isinstance(sample.label, int)
        else numbers.get(sample.label or "", UNLABELED)
        for sample in found
    ]
    spans = Spans.of(tars, [(sample.file, sample.image) for sample in found])
    digest = hashlib.sha256()
    for sample in found:
        facts = (
            f"{tars[sample.file].name}\0{sample.image.name}\0{sample.image.size}\0{sample.label}\0"
        )
        digest.update(facts.encode("utf-8", "surrogateescape"))
    unchanged = [stamp(path) for path in tars]
    return Split(
        dataset="webdataset",
        name=name,
        classes=classes,
        labels=np.array(labels, np.int64),
        images=spans.take,
        facts={"input": digest.hexdigest()},
        grouped=True,
        names=lambda number: f"{tars[found[number].file].name}/{found[number].image.name}",
        where=str(tars[0].parent),
        stamp=lambda which: "\n".join(unchanged[file] for file in np.unique(spans.file[which])),
    )
