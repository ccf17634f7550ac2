"""Where images come from: one file each, and this table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import cifar, imagefolder, imagenet, photos, stl10, webdataset
from .base import SourceRequest, Split

_FILE_OPTIONS = frozenset({"--resize-short", "--quality", "--max-pixels", "--on-bad"})
"""Options that only make sense where there are image files to decode."""
_FOLDER_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """A layout of raw images."""

    read: Callable[[SourceRequest], Sequence[Split]]
    options: frozenset[str]
    """Options of the command line that this source takes, of those that not every source does."""
    splits: tuple[str, ...] = ("train", "val")
    """Splits that ``--split`` may name."""
    default_splits: tuple[str, ...] = ("train", "val")
    """The splits to make, as far as they are there, if none is named."""


SOURCES: dict[str, Source] = {
    "cifar10": Source(cifar.cifar10, frozenset({"--root", "--download"})),
    "cifar100": Source(cifar.cifar100, frozenset({"--root", "--download"})),
    "imagefolder": Source(
        imagefolder.imagefolder,
        _FILE_OPTIONS | {"--root", "--classes"},
        _FOLDER_SPLITS,
        _FOLDER_SPLITS,
    ),
    "imagenet": Source(imagenet.imagenet, _FILE_OPTIONS | {"--root", "--classes"}),
    "photos": Source(photos.photos, frozenset()),
    "stl10": Source(
        stl10.stl10,
        frozenset({"--root", "--download"}),
        splits=stl10.SPLITS,
        default_splits=("train", "val", "unlabeled"),
    ),
    "webdataset": Source(
        webdataset.webdataset,
        _FILE_OPTIONS | {"--root", "--image-field", "--label-field"},
        _FOLDER_SPLITS,
        _FOLDER_SPLITS,
    ),
}
