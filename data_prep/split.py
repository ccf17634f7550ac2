"""What the command line asks of a source, and what a source offers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.manifest import DataError

UNLABELED = -1
"""The label of an image whose class is not known."""
LABELS = "labels"
"""What the manifest of some classes of a split states of its source: their labels there."""


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
class Raw:
    """An image as the source has it."""

    data: bytes | NDArray[np.uint8]
    """A file's bytes, or ``(H, W, 3)`` pixels that no file needs to be decoded for."""
    name: str = ""
    """What to call it should it be another one than before."""
    flaw: str = ""
    """Why it must not even be read ("" = it may)."""


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
    images: Callable[[NDArray[np.int64]], Iterable[Raw]]
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
