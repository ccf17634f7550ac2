"""Random parameters of the augmented views: drawn here, carried out by a backend.

Every number is addressed by (seed, epoch, sample id, view), so an augmentation does not depend
on the batch, the rank or the worker that happens to carry it out, and can be looked up later.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum, auto

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vssl_dist.config import ViewRecipe
from vssl_dist.data.philox import uniforms

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_CROP_ATTEMPTS = 10


class _Slot(IntEnum):
    """The index of each decision in a sample's uniform numbers.

    Each decision has its own slot whether or not the recipe uses it: changing one probability
    of a recipe leaves all other decisions as they were.  New slots go before the crop's.
    """

    FLIP = 0
    JITTER = auto()
    BRIGHTNESS = auto()
    CONTRAST = auto()
    SATURATION = auto()
    HUE = auto()
    GRAYSCALE = auto()
    BLUR = auto()
    BLUR_SIGMA = auto()
    SOLARIZE = auto()
    CROP_Y = auto()
    CROP_X = auto()
    CROP_AREA = auto()  # one per attempt, then one aspect ratio per attempt


@dataclass(frozen=True)
class Draws:
    """The parameters of one view of B samples; operations run in the order of the fields.

    A parameter that was not drawn has the value that changes nothing (factor 1, shift 0, sigma
    0), so a backend may apply every operation to every sample.
    """

    crop: NDArray[np.int32]
    """``(B, 4)``: top, left, height, width in pixels of the decoded image."""
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    """Towards the mean of the grey image, rounded down pixel by pixel."""
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    """Shift in turns of the colour circle."""
    grayscale: NDArray[np.bool_]
    blur_sigma: NDArray[np.float32]
    """Standard deviation in pixels; 0 is no blur."""
    solarize: NDArray[np.bool_]
    """Whether values of at least 128 are inverted."""

    def __len__(self) -> int:
        return len(self.flip)

    def take(self, rows: ArrayLike) -> Draws:
        """Return the draws of some of the samples."""
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))


def blur_window(sigma: ArrayLike) -> NDArray[np.int32]:
    """Return the side of the Gaussian's window in pixels: three sigmas to each side.

    >>> blur_window([0.0, 0.1, 1.0, 2.0]).tolist()
    [1, 3, 7, 13]
    """
    return (2 * np.ceil(3 * np.asarray(sigma, np.float64)) + 1).astype(np.int32)


def draw(
    recipe: ViewRecipe, seed: int, view: int, ids: Int64, epochs: Int64, sizes: Int64
) -> Draws:
    """Draw one view's parameters for a batch.

    Args:
        recipe: Ranges and probabilities.
        seed: Seed of the run, below 2**32.
        view: Number of the view: two views with equal recipes still differ.
        ids: ``(B,)`` sample ids as planned.
        epochs: ``(B,)`` epoch of each sample.
        sizes: ``(B, 2)`` height and width of the decoded images.

    Returns:
        The draws; row i depends on row i of the arguments only.
    """
    u = uniforms(seed, epochs, ids, view, _Slot.CROP_AREA + 2 * _CROP_ATTEMPTS)
    is_jittered = u[:, _Slot.JITTER] < recipe.jitter

    def factor(slot: _Slot, spread: float) -> NDArray[np.float32]:
        value = _between(u[:, slot], max(0.0, 1 - spread), 1 + spread)
        return np.where(is_jittered, value, 1.0).astype(np.float32)

    hue = np.where(is_jittered, _between(u[:, _Slot.HUE], -recipe.hue, recipe.hue), 0.0)
    sigma = _between(u[:, _Slot.BLUR_SIGMA], *recipe.blur_sigma)
    is_blurred = u[:, _Slot.BLUR] < recipe.blur
    return Draws(
        crop=_crop(recipe, u, sizes),
        flip=u[:, _Slot.FLIP] < recipe.flip,
        brightness=factor(_Slot.BRIGHTNESS, recipe.brightness),
        contrast=factor(_Slot.CONTRAST, recipe.contrast),
        saturation=factor(_Slot.SATURATION, recipe.saturation),
        hue=hue.astype(np.float32),
        grayscale=u[:, _Slot.GRAYSCALE] < recipe.grayscale,
        blur_sigma=np.where(is_blurred, sigma, 0.0).astype(np.float32),
        solarize=u[:, _Slot.SOLARIZE] < recipe.solarize,
    )


def _between(u: Float64, low: float, high: float) -> Float64:
    return low + (high - low) * u


def _crop(recipe: ViewRecipe, u: Float64, sizes: Int64) -> NDArray[np.int32]:
    """Draw torchvision's random resized crop: ten attempts, then the largest centred crop."""
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    low, high = np.log(recipe.crop_ratio)
    area = height * width * _between(_attempts(u, 0), *recipe.crop_scale)
    ratio = np.exp(_between(_attempts(u, 1), low, high))
    h, w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)

    first = fits.argmax(axis=1)[:, None]  # 0 also where no attempt fits: replaced below
    h, w = np.take_along_axis(h, first, axis=1), np.take_along_axis(w, first, axis=1)
    top = np.floor(u[:, [_Slot.CROP_Y]] * (height - h + 1))
    left = np.floor(u[:, [_Slot.CROP_X]] * (width - w + 1))

    ratio = np.clip(width / height, *recipe.crop_ratio)
    widest, tallest = np.rint(height * ratio), np.rint(width / ratio)
    widest, tallest = np.minimum(widest, width), np.minimum(tallest, height)
    centred = [(height - tallest) // 2, (width - widest) // 2, tallest, widest]
    has_fit = np.take_along_axis(fits, first, axis=1)
    boxes = np.where(has_fit, np.hstack([top, left, h, w]), np.hstack(centred))
    return boxes.astype(np.int32)


def _attempts(u: Float64, block: int) -> Float64:
    """Return the attempts' numbers for the areas (block 0) or the aspect ratios (block 1)."""
    start = _Slot.CROP_AREA + block * _CROP_ATTEMPTS
    return u[:, start : start + _CROP_ATTEMPTS]
