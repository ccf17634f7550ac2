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
from vssl_dist.data.philox import addressed_uniforms

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_CROP_ATTEMPTS = 10


class _UniformSlot(IntEnum):
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
    recipe: ViewRecipe, seed: int, view: int, ids: Int64, epochs: Int64, image_sizes: Int64
) -> Draws:
    """Draw one view's parameters for a batch.

    Args:
        recipe: Ranges and probabilities.
        seed: Seed of the run, below 2**32.
        view: Number of the view: two views with equal recipes still differ.
        ids: ``(B,)`` sample ids as planned.
        epochs: ``(B,)`` epoch of each sample.
        image_sizes: ``(B, 2)`` height and width of the decoded images.

    Returns:
        The draws; row i depends on row i of the arguments only.
    """
    uniform_numbers = addressed_uniforms(
        seed, epochs, ids, view, _UniformSlot.CROP_AREA + 2 * _CROP_ATTEMPTS
    )
    is_jittered = uniform_numbers[:, _UniformSlot.JITTER] < recipe.jitter

    def draw_factor(slot: _UniformSlot, max_change: float) -> NDArray[np.float32]:
        factors = _scale_to_range(
            uniform_numbers[:, slot], max(0.0, 1 - max_change), 1 + max_change
        )
        return np.where(is_jittered, factors, 1.0).astype(np.float32)

    hue_turns = np.where(
        is_jittered,
        _scale_to_range(uniform_numbers[:, _UniformSlot.HUE], -recipe.hue, recipe.hue),
        0.0,
    )
    blur_sigmas = _scale_to_range(uniform_numbers[:, _UniformSlot.BLUR_SIGMA], *recipe.blur_sigma)
    is_blurred = uniform_numbers[:, _UniformSlot.BLUR] < recipe.blur
    return Draws(
        crop=_draw_crop_boxes(recipe, uniform_numbers, image_sizes),
        flip=uniform_numbers[:, _UniformSlot.FLIP] < recipe.flip,
        brightness=draw_factor(_UniformSlot.BRIGHTNESS, recipe.brightness),
        contrast=draw_factor(_UniformSlot.CONTRAST, recipe.contrast),
        saturation=draw_factor(_UniformSlot.SATURATION, recipe.saturation),
        hue=hue_turns.astype(np.float32),
        grayscale=uniform_numbers[:, _UniformSlot.GRAYSCALE] < recipe.grayscale,
        blur_sigma=np.where(is_blurred, blur_sigmas, 0.0).astype(np.float32),
        solarize=uniform_numbers[:, _UniformSlot.SOLARIZE] < recipe.solarize,
    )


def _scale_to_range(uniform_numbers: Float64, low: float, high: float) -> Float64:
    return low + (high - low) * uniform_numbers


def _draw_crop_boxes(
    recipe: ViewRecipe, uniform_numbers: Float64, image_sizes: Int64
) -> NDArray[np.int32]:
    """Draw torchvision's random resized crop: ten attempts, then the largest centred crop."""
    height, width = image_sizes[:, :1].astype(np.float64), image_sizes[:, 1:].astype(np.float64)
    low, high = np.log(recipe.crop_ratio)
    attempt_areas = (
        height * width * _scale_to_range(_attempt_uniforms(uniform_numbers, 0), *recipe.crop_scale)
    )
    aspect_ratios = np.exp(_scale_to_range(_attempt_uniforms(uniform_numbers, 1), low, high))
    box_heights, box_widths = (
        np.rint(np.sqrt(attempt_areas / aspect_ratios)),
        np.rint(np.sqrt(attempt_areas * aspect_ratios)),
    )
    attempt_fits = (
        (box_heights > 0) & (box_heights <= height) & (box_widths > 0) & (box_widths <= width)
    )

    first_fit = attempt_fits.argmax(axis=1)[:, None]  # 0 also where no attempt fits: replaced below
    box_heights, box_widths = (
        np.take_along_axis(box_heights, first_fit, axis=1),
        np.take_along_axis(box_widths, first_fit, axis=1),
    )
    box_tops = np.floor(uniform_numbers[:, [_UniformSlot.CROP_Y]] * (height - box_heights + 1))
    box_lefts = np.floor(uniform_numbers[:, [_UniformSlot.CROP_X]] * (width - box_widths + 1))

    aspect_ratios = np.clip(width / height, *recipe.crop_ratio)
    largest_width, largest_height = np.rint(height * aspect_ratios), np.rint(width / aspect_ratios)
    largest_width, largest_height = (
        np.minimum(largest_width, width),
        np.minimum(largest_height, height),
    )
    centred_boxes = [
        (height - largest_height) // 2,
        (width - largest_width) // 2,
        largest_height,
        largest_width,
    ]
    has_fitting_attempt = np.take_along_axis(attempt_fits, first_fit, axis=1)
    boxes = np.where(
        has_fitting_attempt,
        np.hstack([box_tops, box_lefts, box_heights, box_widths]),
        np.hstack(centred_boxes),
    )
    return boxes.astype(np.int32)


def _attempt_uniforms(uniform_numbers: Float64, block_number: int) -> Float64:
    """Return the attempts' numbers for the areas (block 0) or the aspect ratios (block 1)."""
    start = _UniformSlot.CROP_AREA + block_number * _CROP_ATTEMPTS
    return uniform_numbers[:, start : start + _CROP_ATTEMPTS]
