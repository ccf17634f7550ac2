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
"""What the manifest of some classes of a split states of its source: their labels there."""
_MOST_KINDS = 12
"""Of what was left out, so many are counted one by one: it remains a line."""


@dataclass(frozen=True)
class Request:
    """The part of the command line that a source understands."""

    root: Path | None
    """Folder of the raw images; None where the source brings its own."""
    splits: tuple[str, ...] = ("train", "val")
    explicit: bool = False
    """Whether the user named the splits: then none of them may be absent."""
    download: bool = False
    classes: Path | None = None
    """File that lists the classes to keep; None keeps all."""
    on_bad: str = "fail"
    """What becomes of what cannot be used: unless it is ``fail``, it is left out and listed."""
    image_field: str | None = None
    """Which member of a WebDataset's sample is its image; None looks for it."""
    label_field: str | None = None
    """Which member is its label, or ``FIELD:KEY`` for what a JSON member states."""
    unpack: Callable[[Path], Path] | None = None
    """Where a compressed archive is unpacked to, which is done if need be."""

    @property
    def skips(self) -> bool:
        """Whether one file that cannot be read is left out, and does not end the whole."""
        return self.on_bad != "fail"

    def existing_root(self) -> Path:
        """The root, which is there.

        Raises:
            DataError: None was given, or it does not exist.
        """
        if self.root is None:
            raise DataError("--root is required: the folder with the raw images")
        if not self.root.exists():
            raise DataError(f"{self.root}: no such file or folder (--root)")
        return self.root


@dataclass(frozen=True)
class LeftOut:
    """Something that lies among the images and is none."""

    name: str
    """As a sample's: within ``where``."""
    reason: str
    kind: str
    """What it is counted as, such as ``".txt"``."""
    count: int = 1
    """So many of them are told as one."""
    within: int = 0
    """Files in a folder that is told as one."""

    @classmethod
    def file(cls, name: str, reason: str = "no picture") -> LeftOut:
        """A file, which counts by its suffix.

        >>> LeftOut.file("a/words.TXT").kind, LeftOut.file("a/.DS_Store").kind
        ('.txt', 'hidden')
        """
        path = PurePosixPath(name)
        if path.name.startswith("."):
            return cls(name, "a hidden file", "hidden")
        return cls(name, reason, path.suffix.lower() or "without suffix")

    @classmethod
    def folder(cls, name: str, reason: str, within: int = 0) -> LeftOut:
        """A folder with all files that are in it."""
        return cls(f"{name}/", reason, "folder", within=within)


def count_by_kind(left_out: Sequence[LeftOut]) -> str:
    """How many of each kind, in words, the most frequent first; "" of none.

    >>> count_by_kind([LeftOut.file("a.txt"), LeftOut.file("b"), LeftOut.file("c.txt")])
    '2 .txt, 1 without suffix'
    >>> count_by_kind([LeftOut.folder("a", "", 3), LeftOut.folder("b", "", 4)])
    '2 folders (7 files in folders)'
    """
    of_kind: Counter[str] = Counter()
    for one in left_out:
        of_kind[one.kind] += one.count
    counts = sorted(of_kind.items(), key=lambda one: (-one[1], one[0]))
    shown = [
        f"{count} {kind}s" if kind == "folder" and count > 1 else f"{count} {kind}"
        for kind, count in counts[:_MOST_KINDS]
    ]
    if rest := sum(count for _, count in counts[_MOST_KINDS:]):
        shown.append(f"{rest} others")
    within = sum(one.within for one in left_out)
    return ", ".join(shown) + (f" ({within} file{'s'[: within > 1]} in folders)" if within else "")


def _unstamped(which: NDArray[np.int64]) -> str:
    return ""


@dataclass(frozen=True)
class Split:
    """One split of a dataset, not yet read.

    A sample's number is its place in the source's own order, ``0 .. N - 1``.
    """

    dataset: str
    name: str
    """Such as ``"train"`` or ``"val"``: also the name of the folder it is written to."""
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """``(N,)``: one per sample, `UNLABELED` where there is none."""
    images: Callable[[NDArray[np.int64]], Iterable[RawImage]]
    """From sample numbers to their images: picklable, and read only when iterated."""
    facts: Mapping[str, str | int]
    """What the bytes depend on besides options and content; goes into the manifest."""
    grouped: bool
    """Whether neighbours are of one class, so that the order has to be mixed."""
    names: Callable[[int], str] = "image {}".format
    """From a sample's number to what it is called within ``where``, on every machine alike."""
    where: str = ""
    """What stands before a name in messages: the path of a folder or archive."""
    stamp: Callable[[NDArray[np.int64]], str] = _unstamped
    """What tells, without reading, that the images of some numbers may have been replaced."""
    left_out: Sequence[LeftOut] = ()
    """What lies there besides: no sample, and without effect on any."""
    remark: str = ""
    """What the user should know about all of it."""

    @property
    def labelling(self) -> str:
        """Digest of the classes and of all labels: a class more or less renumbers the others."""
        named = json.dumps(self.classes).encode()
        return hashlib.sha256(named + self.labels.astype("<i8").tobytes()).hexdigest()

    def called(self, number: int) -> str:
        """A sample's name for messages.

        >>> nothing = np.zeros(0, np.int64)
        >>> Split("d", "val", (), nothing, lambda which: [], {}, False, where="a.tar").called(3)
        'a.tar/image 3'
        """
        return f"{self.where}/{self.names(number)}" if self.where else self.names(number)

    def besides(self, left_out: Iterable[LeftOut]) -> Split:
        """This split, with more that was left out beside it."""
        return replace(self, left_out=(*self.left_out, *left_out))
