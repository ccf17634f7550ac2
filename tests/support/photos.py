"""Small real datasets: crops of the photographs in scikit-image's wheel, as written shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.images.raw_image import RawImage
from data_prep.sharding.dataset import BuildOptions, build_split
from data_prep.sources.base import Split
from data_prep.sources.photos import PHOTOGRAPH_NAMES, read_photograph


@dataclass(frozen=True)
class Crops:
    """Real crops, numbered: crop ``n`` is of photograph ``n % classes`` and always the same."""

    which: NDArray[np.int64]
    classes: int
    sides: tuple[int, int]
    suffix: str

    def __iter__(self) -> Iterator[RawImage]:
        for number in self.which.tolist():
            pixels = crop(number, self.classes, self.sides)
            stream = io.BytesIO()
            kind = "JPEG" if self.suffix == "jpg" else "PNG"
            Image.fromarray(pixels).save(stream, kind, quality=90)
            yield RawImage(stream.getvalue())


def crop(number: int, classes: int, sides: tuple[int, int] = (32, 32)) -> NDArray[np.uint8]:
    """Crop ``number`` as ``(H, W, 3)`` uint8; each side is drawn from ``sides``, both included."""
    whole = picture(PHOTOGRAPH_NAMES[number % classes])
    random = np.random.default_rng(number)
    height, width = random.integers(sides[0], sides[1] + 1, 2)
    y = random.integers(whole.shape[0] - height + 1)
    x = random.integers(whole.shape[1] - width + 1)
    return whole[y : y + height, x : x + width]


def picture(file: str) -> NDArray[np.uint8]:
    """A whole photograph of scikit-image's package, ``(H, W, 3)`` uint8."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return read_photograph(Path(spec.origin).parent / "data" / file)


def tiny_dataset(
    tmp_path: Path,
    *,
    samples: int = 64,
    classes: int = 4,
    shard_size: int = 16,
    split: str = "train",
    suffix: str = "png",
    sides: tuple[int, int] = (32, 32),
    first: int = 0,
) -> Path:
    """Write a dataset and return the folder that holds its ``manifest.json``.

    Args:
        tmp_path: Parent; the dataset is ``tmp_path/split``.
        samples: How many; their labels are ``0, 1, .., classes - 1, 0, ..`` in order of id.
        classes: At most 16.
        shard_size: Samples per shard; the last shard may have fewer.
        split: ``"train"`` or ``"val"``.
        suffix: ``"png"`` (lossless) or ``"jpg"``.
        sides: Smallest and largest height and width of an image; at most (32, 150).
        first: Number of the first crop: ranges that do not overlap give other crops.
    """
    made = Split(
        dataset="tiny",
        name=split,
        classes=tuple(PHOTOGRAPH_NAMES[label] for label in range(classes)),
        labels=np.arange(first, first + samples) % classes,
        make_images=lambda which: Crops(which + first, classes, sides, suffix),
        facts={},
        is_grouped_by_class=False,
    )
    return build_split(
        made, tmp_path, BuildOptions(shard_size=shard_size), lambda done: None
    ).folder


def three_splits(folder: Path, *, foreign: int) -> Path:
    """Crops of six photographs as ``train`` and ``val``, of ten others as ``foreign``."""
    tiny_dataset(folder, samples=180, classes=6, shard_size=100)
    val = tiny_dataset(folder / "a", samples=60, classes=6, split="val", first=9_000)
    val.rename(folder / "val")
    strange = tiny_dataset(folder / "b", samples=foreign, classes=16, split="val", first=12_000)
    strange.rename(folder / "foreign")
    return folder
