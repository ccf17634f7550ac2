"""Where images come from: one file each, and this table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import cifar, imagefolder, imagenet, photos, stl10, webdataset
from .base import Request, Split

_FILES = frozenset({"--resize-short", "--quality", "--max-pixels", "--on-bad"})
"""What only makes sense where there are image files to decode."""
_FOLDERS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """A layout of raw images."""

    read: Callable[[Request], Sequence[Split]]
    takes: frozenset[str]
    """Its options, of those that not every source has."""
    splits: tuple[str, ...] = ("train", "val")
    """What ``--split`` may name."""
    default: tuple[str, ...] = ("train", "val")
    """The splits to make, as far as they are there, if none is named."""


SOURCES: dict[str, Source] = {
    "cifar10": Source(cifar.cifar10, frozenset({"--root", "--download"})),
    "cifar100": Source(cifar.cifar100, frozenset({"--root", "--download"})),
    "imagefolder": Source(
        imagefolder.imagefolder, _FILES | {"--root", "--classes"}, _FOLDERS, _FOLDERS
    ),
    "imagenet": Source(imagenet.imagenet, _FILES | {"--root", "--classes"}),
    "photos": Source(photos.photos, frozenset()),
    "stl10": Source(
        stl10.stl10,
        frozenset({"--root", "--download"}),
        splits=stl10.SPLITS,
        default=("train", "val", "unlabeled"),
    ),
    "webdataset": Source(
        webdataset.webdataset,
        _FILES | {"--root", "--image-field", "--label-field"},
        _FOLDERS,
        _FOLDERS,
    ),
}
