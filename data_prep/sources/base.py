"""What the command line asks of a source, and what a source offers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from vssl_dist.errors import DataError

from ..images.raw_image import RawImage

UNLABELED = -1
"""The label of an image whose class is not known."""
LABELS_KEY = "labels"
"""Key in a subset's manifest: the labels that its classes have in the whole split."""
_MAX_COUNTED_KINDS = 12
"""Kinds of left-out files that are counted one by one: the count remains a line."""


@dataclass(frozen=True)
class SourceRequest:
    """The part of the command line that a source understands."""

    root: Path | None
    """Folder of the raw images; None where the source brings its own."""
    splits: tuple[str, ...] = ("train", "val")
    has_named_splits: bool = False
    """Whether the user named the splits: then none of them may be absent."""
    download: bool = False
    classes: Path | None = None
    """File that lists the classes to keep; None keeps all."""
    on_bad: str = "fail"
    """What to do with what cannot be used: unless it is ``fail``, that is left out and listed."""
    image_field: str | None = None
    """Which member of a WebDataset's sample is its image; None looks for it."""
    label_field: str | None = None
    """Which member of such a sample is its label, or ``FIELD:KEY`` for a key of a JSON member."""
    unpack: Callable[[Path], Path] | None = None
    """Unpacks a compressed archive if need be, and returns the path of the unpacked one."""

    @property
    def skip_unreadable(self) -> bool:
        """Whether a file that cannot be read is left out instead of ending the program."""
        return self.on_bad != "fail"

    def require_root(self) -> Path:
        """Return the root, which exists.

        Raises:
            DataError: No root was given, or it does not exist.
        """
        if self.root is None:
            raise DataError("--root is required: the folder with the raw images")
        if not self.root.exists():
            raise DataError(f"{self.root}: no such file or folder (--root)")
        return self.root


@dataclass(frozen=True)
class LeftOutEntry:
    """Something that lies among the images and is none."""

    name: str
    """Name within the location of the split, like a sample's."""
    reason: str
    kind: str
    """Kind that it is counted as, such as ``".txt"``."""
    count: int = 1
    """How many files this entry stands for."""
    num_files_within: int = 0
    """How many files are in a folder that is one entry."""

    @classmethod
    def file(cls, name: str, reason: str = "no picture") -> LeftOutEntry:
        """Make the entry of a file, which counts by its suffix.

        >>> LeftOutEntry.file("a/words.TXT").kind, LeftOutEntry.file("a/.DS_Store").kind
        ('.txt', 'hidden')
        """
        path = PurePosixPath(name)
        if path.name.startswith("."):
            return cls(name, "a hidden file", "hidden")
        return cls(name, reason, path.suffix.lower() or "without suffix")

    @classmethod
    def folder(cls, name: str, reason: str, num_files_within: int = 0) -> LeftOutEntry:
        """Make the entry of a folder with all files that are in it."""
        return cls(f"{name}/", reason, "folder", num_files_within=num_files_within)


def describe_counts_by_kind(left_out: Sequence[LeftOutEntry]) -> str:
    """Count left-out entries by kind, in words, the most frequent first; "" for none.

    >>> describe_counts_by_kind(
    ...     [LeftOutEntry.file("a.txt"), LeftOutEntry.file("b"), LeftOutEntry.file("c.txt")]
    ... )
    '2 .txt, 1 without suffix'
    >>> describe_counts_by_kind([LeftOutEntry.folder("a", "", 3), LeftOutEntry.folder("b", "", 4)])
    '2 folders (7 files in folders)'
    """
    counts_by_kind: Counter[str] = Counter()
    for entry in left_out:
        counts_by_kind[entry.kind] += entry.count
    counts = sorted(counts_by_kind.items(), key=lambda entry: (-entry[1], entry[0]))
    kind_phrases = [
        f"{count} {kind}s" if kind == "folder" and count > 1 else f"{count} {kind}"
        for kind, count in counts[:_MAX_COUNTED_KINDS]
    ]
    if other_count := sum(count for _, count in counts[_MAX_COUNTED_KINDS:]):
        kind_phrases.append(f"{other_count} others")
    num_files_within = sum(entry.num_files_within for entry in left_out)
    return ", ".join(kind_phrases) + (
        f" ({num_files_within} file{'s'[: num_files_within > 1]} in folders)"
        if num_files_within
        else ""
    )


def _make_empty_stamp(numbers: NDArray[np.int64]) -> str:
    return ""


@dataclass(frozen=True)
class Split:
    """One split of a dataset, not yet read.

    A sample's number is its place in the source's own order, ``0 .. N - 1``.
    """

    dataset: str
    name: str
    """Name such as ``"train"`` or ``"val"``, also of the folder that it is written to."""
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """``(N,)``: one per sample, `UNLABELED` where there is none."""
    make_images: Callable[[NDArray[np.int64]], Iterable[RawImage]]
    """Makes the images of some sample numbers: picklable, and read only when iterated."""
    facts: Mapping[str, str | int]
    """What the bytes depend on besides options and content; goes into the manifest."""
    is_grouped_by_class: bool
    """Whether neighbours are of one class, so that the order has to be mixed."""
    name_of: Callable[[int], str] = "image {}".format
    """Names a sample, by its number, within ``location``: on every machine alike."""
    location: str = ""
    """Path of the folder or archive, which stands before a name in messages."""
    make_stamp: Callable[[NDArray[np.int64]], str] = _make_empty_stamp
    """Makes, without reading, a text that changes when the images of some numbers do."""
    left_out: Sequence[LeftOutEntry] = ()
    """Files and folders beside the samples, without effect on any."""
    remark: str = ""
    """What the user should know about all of it."""

    @property
    def labels_digest(self) -> str:
        """Digest of the classes and of all labels: a class more or less renumbers the others."""
        classes_json = json.dumps(self.classes).encode()
        return hashlib.sha256(classes_json + self.labels.astype("<i8").tobytes()).hexdigest()

    def full_name(self, number: int) -> str:
        """Make a sample's name for messages.

        >>> nothing = np.zeros(0, np.int64)
        >>> split = Split("d", "val", (), nothing, lambda numbers: [], {}, False, location="a.tar")
        >>> split.full_name(3)
        'a.tar/image 3'
        """
        return f"{self.location}/{self.name_of(number)}" if self.location else self.name_of(number)

    def with_left_out(self, left_out: Iterable[LeftOutEntry]) -> Split:
        """Copy this split with more entries that were left out beside it."""
        return replace(self, left_out=(*self.left_out, *left_out))
