"""What DALI's graph takes from outside: draws, as the numbers that its operators want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.views import Draws, blur_window

Feed = Mapping[str, Any]
"""Rows of numbers, by the name of the input that takes them."""
FINE = 64
"""Steps per level in which contrast and saturation are summed: 2 * 64 * 255 fits into 16 bits."""
PLANES = ("first", "second", "third")
"""Inputs that say which colour channels the three planes of the hue are."""


def source_name(view: int, key: str) -> str:
    """Name of one view's input in the graph."""
    return f"view{view}_{key}"


def jitters(recipe: ViewRecipe) -> bool:
    """Whether the colour jitter ever does anything."""
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return recipe.jitter > 0 and max(strengths) > 0


def feed_of(spec: BackendSpec, draws: Sequence[Draws]) -> Feed:
    """What the graph of all views takes from outside, for one `Draws` per recipe."""
    return {
        source_name(view, key): value
        for view, (recipe, draw) in enumerate(zip(spec.recipes, draws, strict=True))
        for key, value in inputs(recipe, draw, spec.device != "cpu").items()
    }


def inputs(recipe: ViewRecipe, draw: Draws, on_gpu: bool) -> dict[str, NDArray[Any]]:
    """What the graph of ``recipe`` takes from outside, one row per sample."""
    feed: dict[str, NDArray[Any]] = {
        "start": draw.crop[:, :2],
        "shape": draw.crop[:, 2:],
        "flip": draw.flip.astype(np.int32),
    }
    if jitters(recipe):
        feed |= _jitter(recipe, draw, on_gpu)
    if recipe.grayscale:
        feed["grayscale"] = draw.grayscale
    if recipe.blur:
        feed["blurred"] = draw.blur_sigma > 0
        feed |= _blur(recipe, draw, on_gpu)
    if recipe.solarize:
        feed["solarize"] = draw.solarize
    return feed


def _jitter(recipe: ViewRecipe, draw: Draws, on_gpu: bool) -> dict[str, NDArray[Any]]:
    factors = np.stack([draw.brightness, draw.contrast, draw.saturation, 1 + draw.hue])
    feed: dict[str, NDArray[Any]] = {"jittered": (factors != 1).any(axis=0)}
    if recipe.brightness:
        feed["brightness"] = draw.brightness
    if recipe.contrast:
        parts = FINE if on_gpu else 1
        feed["contrast"] = parts * draw.contrast
        feed["contrast_grey"] = parts * (1 - draw.contrast)
    if recipe.saturation:
        feed["saturation"] = FINE * draw.saturation
        feed["saturation_grey"] = FINE * (1 - draw.saturation)
    if recipe.hue:
        feed |= _rotation(draw.hue)
    return feed


def _blur(recipe: ViewRecipe, draw: Draws, on_gpu: bool) -> dict[str, NDArray[Any]]:
    """The blur's sigma and window on a GPU; on the CPU the Gaussian itself, across and down."""
    # The samples that are not blurred do not get there; their sigma must only be valid.
    sigma = np.where(draw.blur_sigma > 0, draw.blur_sigma, recipe.blur_sigma[1])
    if on_gpu:
        return {"sigma": sigma.astype(np.float32), "window": blur_window(sigma)}
    taps = gaussians(sigma, int(blur_window(recipe.blur_sigma[1])))
    return {"across": taps[:, None, :], "down": taps[:, :, None]}


def gaussians(sigma: NDArray[np.floating[Any]], width: int) -> NDArray[np.float32]:
    """Gaussians that are cut off at their window and sum to 1.

    Args:
        sigma: ``(B,)``, in pixels, above 0.
        width: Taps of each, the widest window.

    Returns:
        ``(B, width)``; what lies outside a sample's own window is 0.

    >>> [round(float(tap), 3) for tap in gaussians(np.array([0.5]), 7)[0]]
    [0.0, 0.0, 0.106, 0.787, 0.106, 0.0, 0.0]
    """
    away = np.abs(np.arange(width) - width // 2)
    taps: NDArray[np.float64] = np.exp(-0.5 * (away / sigma[:, None]) ** 2)
    taps[away > blur_window(sigma)[:, None] // 2] = 0
    taps /= taps.sum(axis=1, keepdims=True)
    return taps.astype(np.float32)


def _rotation(hue: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """A turn of the hue as whole sixths of a turn and a rest of at most half a sixth.

    A third of a turn renames the channels and half a turn mirrors them between a pixel's least
    and greatest value, so whole sixths cost a choice of planes and a change of sign.  The rest
    moves each channel towards where its neighbour in the direction of the turn has left room.
    """
    sixths = np.rint(6 * hue).astype(np.int64)
    rest = 6 * hue - sixths
    odd = sixths % 2
    red = -((sixths - 3 * odd) // 2) % 3  # the channel that becomes red
    towards = np.where(rest < 0, -1, 1)
    order = np.stack([red, red + towards, red - towards]) % 3
    return {
        **{name: row.astype(np.int32) for name, row in zip(PLANES, order, strict=True)},
        "rest": np.rint(256 * np.abs(rest)).astype(np.int16),
        "mirrored": odd.astype(np.int16),
        "sign": (1 - 2 * odd).astype(np.int16),
        "backwards": rest < 0,
    }
