"""Where images come from: one file each, and this table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_prep.sources import cifar, imagefolder, photos
from data_prep.split import Request, Split

SOURCES: dict[str, Callable[[Request], Sequence[Split]]] = {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "imagefolder": imagefolder.imagefolder,
    "photos": photos.photos,
}
