"""What the two backends are compared on: sets of images, single operations, whole recipes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.images.examine import (
    DEFAULT_RULES,
    ImageVerdict,
    examine_image,
)
from data_prep.sources.photos import PHOTOGRAPH_NAMES
from vssl_dist.config import Normalisation, ViewRecipe
from vssl_dist.data.store.dataset import Samples
from vssl_dist.data.views import Draws, draw
from vssl_dist.errors import ConfigError

LEVEL_NORMALISATION = Normalisation(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
"""The normalisation that leaves levels from 0 to 255."""
ALL_OPERATIONS_RECIPE = ViewRecipe(jitter=1, grayscale=0.5, blur=0.5, solarize=0.5)
"""Every operation is in DALI's graph, also where a draw changes nothing."""
_SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class ImageSet:
    """A set of encoded images, and the size of the views that are made of them."""

    name: str
    samples: Samples
    side: int


def encoded_samples(images: Iterable[Image.Image], kind: str) -> Samples:
    """Images as PNG or JPEG, in the mode in which they are."""
    files = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, kind, quality=92)
        files.append(stream.getvalue())
    return samples_of_files(files)


def samples_of_files(files: Iterable[bytes]) -> Samples:
    """Encoded images as a backend takes them; what does not decode must not be among them."""
    data = [np.frombuffer(file, np.uint8) for file in files]
    sizes = np.array([Image.open(io.BytesIO(image.tobytes())).size for image in data], np.int64)
    return Samples(data, sizes[:, 1], sizes[:, 0], np.zeros(len(data), np.int64), [])


def photographs() -> list[Image.Image]:
    """The photographs of scikit-image's package, no larger than 500 by 500, grey ones grey."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ConfigError("scikit-image is not installed: its photographs are compared")
    folder, images = Path(spec.origin).parent / "data", []
    for file in PHOTOGRAPH_NAMES:
        with Image.open(folder / file) as image:
            image.thumbnail((500, 500))
            plain = np.asarray(image if image.mode == "L" else image.convert("RGB"))
            images.append(Image.fromarray(plain))  # the pixels alone, without colour profiles
    return images


def photograph_patches(side: int = 32, each: int = 2) -> list[Image.Image]:
    """Patches of the photographs, in colour: ``each`` of every one."""
    images, random = [], np.random.default_rng(0)
    for image in photographs():
        for _ in range(each):
            x, y = (int(random.integers(length - side + 1)) for length in image.size)
            images.append(image.convert("RGB").crop((x, y, x + side, y + side)))
    return images


def extreme_images() -> list[Image.Image]:
    """Images of odd shapes and odd colours that a dataset may hold."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (64, 80, 3), dtype=np.uint8)
    grey_ramp = np.linspace(0, 255, 96).astype(np.uint8)
    photo = photographs()[0]
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    arrays = [
        noise,
        noise[:1],  # one pixel high
        noise[:, :1],  # one pixel wide
        noise[:1, :1],
        np.where(noise < 128, 0, 255).astype(np.uint8),  # nothing but pure colours
        np.stack(
            [
                grey_ramp[None].repeat(40, 0),
                grey_ramp[None, ::-1].repeat(40, 0),
                checkerboard[:40, :1] + grey_ramp,
            ],
            2,
        ),
        np.zeros_like(noise),
        np.full_like(noise, 255),
        np.full_like(noise, (255, 0, 0)),
        np.full_like(noise, 127),
        np.full_like(noise, 128),
        checkerboard[:, :, None].repeat(3, 2),
        grey_ramp[:, None, None].repeat(3, 1).repeat(3, 2),  # tall, and grey in colour
    ]
    images = [Image.fromarray(array) for array in arrays]
    tall, wide = photo.resize((20, 400)), photo.resize((400, 20))
    return [*images, Image.fromarray(checkerboard), photo.convert("L"), tall, wide]


def folder_image_set(folder: Path, limit: int = 48) -> ImageSet:
    """The first JPEGs and PNGs below a folder, as they are stored, for views of 224 pixels.

    Raises:
        ConfigError: There is none, or one of them is damaged.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)[:limit]
    if not paths:
        raise ConfigError(f"{folder}: no JPEG or PNG below this folder")
    for path in paths:
        finding = examine_image(path.read_bytes(), DEFAULT_RULES)
        if finding.verdict is ImageVerdict.REJECT:
            raise ConfigError(f"{path}: {finding.reason}: remove it from the folder")
    return ImageSet(
        folder.resolve().name, samples_of_files(path.read_bytes() for path in paths), 224
    )


def standard_image_sets() -> list[ImageSet]:
    """The cases that need no data: patches, photographs, extremes."""
    return [
        ImageSet("patches of 32", encoded_samples(photograph_patches(), "PNG"), 32),
        ImageSet("photographs", encoded_samples(photographs(), "JPEG"), 224),
        ImageSet("extremes", encoded_samples(extreme_images(), "PNG"), 96),
    ]


def identity_draws(samples: Samples) -> Draws:
    """The whole image, and nothing else."""
    count, zeros = len(samples.data), np.zeros(len(samples.data), np.float32)
    boxes = np.stack([0 * samples.height, 0 * samples.width, samples.height, samples.width], 1)
    off, ones = np.zeros(count, np.bool_), np.ones(count, np.float32)
    return Draws(boxes.astype(np.int32), off, ones, ones, ones, zeros, off, zeros, off)


def recipe_draws(samples: Samples, recipe: ViewRecipe, view: int = 0) -> Draws:
    """What the first epoch of seed 7 would draw."""
    ids = np.arange(len(samples.data), dtype=np.int64)
    return draw(recipe, 7, view, ids, 0 * ids, np.stack([samples.height, samples.width], 1))


def _over_range(draws: Draws, low: float, high: float) -> NDArray[np.float32]:
    return np.linspace(low, high, len(draws), dtype=np.float32)


def _always_on(draws: Draws) -> NDArray[np.bool_]:
    return np.ones(len(draws), np.bool_)


OPERATION_DRAWS: dict[str, Callable[[Draws], Draws]] = {
    "resize": lambda d: d,
    "flip": lambda d: replace(d, flip=_always_on(d)),
    "brightness 0.2 to 1.8": lambda d: replace(d, brightness=_over_range(d, 0.2, 1.8)),
    "contrast 0.2 to 1.8": lambda d: replace(d, contrast=_over_range(d, 0.2, 1.8)),
    "saturation 0.2 to 1.8": lambda d: replace(d, saturation=_over_range(d, 0.2, 1.8)),
    "hue -0.5 to 0.5": lambda d: replace(d, hue=_over_range(d, -0.5, 0.5)),
    "grayscale": lambda d: replace(d, grayscale=_always_on(d)),
    "blur, sigma 0.1 to 2": lambda d: replace(d, blur_sigma=_over_range(d, 0.1, 2.0)),
    "solarize": lambda d: replace(d, solarize=_always_on(d)),
}
"""Each operation alone, over its whole range, on the whole image."""
