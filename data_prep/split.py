"""What the command line asks of a source, and what a source offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.images import Encoded
from vssl_dist.data.manifest import DataError


@dataclass(frozen=True)
class Request:
    """The part of the command line that a source understands."""

    root: Path | None
    """Folder of the raw images; None where the source brings its own."""
    splits: tuple[str, ...] = ("train", "val")
    explicit: bool = False
    """Whether the user named the splits: then none of them may be absent."""
    download: bool = False

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
class Split:
    """One split of a dataset, not yet read."""

    dataset: str
    name: str
    """``"train"`` or ``"val"``: also the name of the folder it is written to."""
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """``(N,)``: one per sample, in the source's own order."""
    images: Callable[[NDArray[np.int64]], Iterable[Encoded]]
    """From sample numbers to their images: picklable, and read only when iterated."""
    facts: Mapping[str, str | int]
    """What the bytes depend on besides the options; goes into the manifest."""
    grouped: bool
    """Whether neighbours are of one class, so that the order has to be mixed."""
