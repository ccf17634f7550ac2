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
    SourceRequest,
    Split,
)

PATCH_SIDE = 32
PATCHES_PER_CLASS = {"train": 400, "val": 100}
MIN_PATCH_CONTRAST = 16
"""Difference of grey levels within a patch, of 255."""
PHOTOGRAPH_NAMES = (
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
    corners: NDArray[np.int64]
    """``(N, 3)``: number of the photograph, y, x."""

    def __iter__(self) -> Iterator[RawImage]:
        for number, y, x in self.corners.tolist():
            picture = read_photograph(self.folder / PHOTOGRAPH_NAMES[number])
            yield RawImage(np.ascontiguousarray(picture[y : y + PATCH_SIDE, x : x + PATCH_SIDE]))


def choose_patch_corners(number: int, picture: NDArray[np.uint8], split: str) -> NDArray[np.int64]:
    """Choose where a split's patches of a photograph lie: distinct, fixed places.

    Args:
        number: Number of the photograph; each gets its own places.
        picture: ``(H, W, 3)`` uint8.
        split: ``"train"`` (the left three quarters) or ``"val"`` (the rest).

    Returns:
        ``(patches, 3)`` int64: number, y, x.
    """
    height, width, _ = picture.shape
    border_column = width * 3 // 4
    first_column, end_column = (0, border_column) if split == "train" else (border_column, width)
    columns = end_column - first_column - PATCH_SIDE + 1
    rows = height - PATCH_SIDE + 1
    # Raw words, because numpy only promises the bit generator's stream.
    key = np.array([number, split == "val"], np.uint64)
    random_words = np.random.Philox(key=key).random_raw(columns * rows)
    corners: list[tuple[int, int, int]] = []
    for position in np.argsort(random_words, kind="stable").tolist():
        y, x = position // columns, position % columns + first_column
        # Plain black occurs in several photographs, and would be one image in both splits.
        if np.ptp(picture[y : y + PATCH_SIDE, x : x + PATCH_SIDE]) >= MIN_PATCH_CONTRAST:
            corners.append((number, y, x))
        if len(corners) == PATCHES_PER_CLASS[split]:
            break
    return np.array(corners, np.int64)


@lru_cache(len(PHOTOGRAPH_NAMES))
def read_photograph(path: Path) -> NDArray[np.uint8]:
    """Read a photograph as ``(H, W, 3)`` uint8."""
    return np.asarray(Image.open(io.BytesIO(_read_photograph_bytes(path))).convert("RGB"))


def photos(request: SourceRequest) -> list[Split]:
    """Make the splits of the photograph patches.

    Raises:
        DataError: scikit-image does not bring a photograph that we need.
    """
    # Not imported: that takes a second, and its loaders may fetch from the network.
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError("photos needs scikit-image: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    digest = hashlib.sha256(
        b"".join(_read_photograph_bytes(folder / name) for name in PHOTOGRAPH_NAMES)
    ).hexdigest()
    return [
        _make_split(folder, name, {"input": digest, "patch": PATCH_SIDE}) for name in request.splits
    ]


def _make_split(folder: Path, name: str, facts: dict[str, str | int]) -> Split:
    pictures = (read_photograph(folder / file) for file in PHOTOGRAPH_NAMES)
    corners = np.concatenate(
        [choose_patch_corners(number, picture, name) for number, picture in enumerate(pictures)]
    )
    return Split(
        dataset="photos",
        name=name,
        classes=tuple(Path(file).stem for file in PHOTOGRAPH_NAMES),
        labels=corners[:, 0].copy(),
        make_images=lambda numbers: PhotoPatches(folder, corners[numbers]),
        facts=facts,
        is_grouped_by_class=True,
        name_of=lambda number: "{}[y={} x={}]".format(
            PHOTOGRAPH_NAMES[corners[number, 0]], *corners[number, 1:]
        ),
    )


def _read_photograph_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: this scikit-image lacks the photograph ({error.strerror}): install "
            "another version"
        ) from error
