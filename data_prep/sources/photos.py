"""Patches of the photographs inside scikit-image's wheel: real images without a download.

A photograph is a class.  Training patches come from its left three quarters, validation
patches from the rest, so no pixel is in both.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vssl_dist.errors import DataError

from ..images.raw_image import RawImage
from .base import (
    Request,
    Split,
)

PATCH_SIDE = 32
PATCHES_PER_CLASS = {"train": 400, "val": 100}
MIN_CONTRAST = 16
"""Difference of grey levels within a patch, of 255."""
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
"""The photographs that lie in the package itself: no drawings, and one of the stereo pair."""


@dataclass(frozen=True)
class PhotoPatches:
    """Patches to cut: which photograph, and where its upper left corner is."""

    folder: Path
    places: NDArray[np.int64]
    """``(N, 3)``: number of the photograph, y, x."""

    def __iter__(self) -> Iterator[RawImage]:
        for number, y, x in self.places.tolist():
            picture = read_photograph(self.folder / PHOTOGRAPHS[number])
            yield RawImage(np.ascontiguousarray(picture[y : y + PATCH_SIDE, x : x + PATCH_SIDE]))


def patch_corners(number: int, picture: NDArray[np.uint8], split: str) -> NDArray[np.int64]:
    """Where a split's patches of photograph ``number`` lie: distinct, fixed places.

    Args:
        number: Of the photograph; each gets its own places.
        picture: ``(H, W, 3)`` uint8.
        split: ``"train"`` (the left three quarters) or ``"val"`` (the rest).

    Returns:
        ``(patches, 3)`` int64: number, y, x.
    """
    height, width, _ = picture.shape
    border = width * 3 // 4
    left, right = (0, border) if split == "train" else (border, width)
    across, down = right - left - PATCH_SIDE + 1, height - PATCH_SIDE + 1
    # Raw words, because numpy only promises the bit generator's stream.
    key = np.array([number, split == "val"], np.uint64)
    words = np.random.Philox(key=key).random_raw(across * down)
    places: list[tuple[int, int, int]] = []
    for place in np.argsort(words, kind="stable").tolist():
        y, x = place // across, place % across + left
        # Plain black occurs in several photographs, and would be one image in both splits.
        if np.ptp(picture[y : y + PATCH_SIDE, x : x + PATCH_SIDE]) >= MIN_CONTRAST:
            places.append((number, y, x))
        if len(places) == PATCHES_PER_CLASS[split]:
            break
    return np.array(places, np.int64)


@lru_cache(len(PHOTOGRAPHS))
def read_photograph(path: Path) -> NDArray[np.uint8]:
    """A photograph as ``(H, W, 3)`` uint8."""
    return np.asarray(Image.open(io.BytesIO(_bytes(path))).convert("RGB"))


def photos(request: Request) -> list[Split]:
    """The splits of the photograph patches.

    Raises:
        DataError: scikit-image does not bring a photograph that we need.
    """
    # Not imported: that takes a second, and its loaders may fetch from the network.
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError("photos needs scikit-image: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    digest = hashlib.sha256(b"".join(_bytes(folder / name) for name in PHOTOGRAPHS)).hexdigest()
    return [_split(folder, name, {"input": digest, "patch": PATCH_SIDE}) for name in request.splits]


def _split(folder: Path, name: str, facts: dict[str, str | int]) -> Split:
    pictures = (read_photograph(folder / file) for file in PHOTOGRAPHS)
    places = np.concatenate(
        [patch_corners(number, picture, name) for number, picture in enumerate(pictures)]
    )
    return Split(
        dataset="photos",
        name=name,
        classes=tuple(Path(file).stem for file in PHOTOGRAPHS),
        labels=places[:, 0].copy(),
        images=lambda which: PhotoPatches(folder, places[which]),
        facts=facts,
        grouped=True,
        names=lambda number: "{}[y={} x={}]".format(
            PHOTOGRAPHS[places[number, 0]], *places[number, 1:]
        ),
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: this scikit-image lacks the photograph ({error.strerror}): install "
            "another version"
        ) from error
