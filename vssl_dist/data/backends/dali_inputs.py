"""The inputs of DALI's graph: draws, as the numbers that its operators need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.views import Draws, blur_window

Inputs = dict[str, NDArray[Any]]
"""One row per sample, by the name of the input; dtypes differ."""
FINE = 64
"""Steps per level in which contrast and saturation are summed: 2 * 64 * 255 fits into 16 bits."""
PLANES = ("first", "second", "third")
"""Names of the inputs that say which colour channels the three planes of the hue are."""


def source_name(view: int, key: str) -> str:
    """Return the name of one view's input in the graph."""
    return f"view{view}_{key}"


def has_jitter(recipe: ViewRecipe) -> bool:
    """Whether the colour jitter of a recipe ever changes anything."""
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return recipe.jitter > 0 and max(strengths) > 0


def graph_inputs(spec: BackendSpec, draws: Sequence[Draws]) -> Inputs:
    """Return the inputs of the graph of all views, for one `Draws` per recipe."""
    return {
        source_name(view, key): value
        for view, (recipe, draw) in enumerate(zip(spec.recipes, draws, strict=True))
        for key, value in dali_inputs_of_view(recipe, draw, spec.device != "cpu").items()
    }


def dali_inputs_of_view(recipe: ViewRecipe, draw: Draws, on_gpu: bool) -> Inputs:
    """Return the inputs of one view, named without the view."""
    inputs: Inputs = {
        "start": draw.crop[:, :2],
        "shape": draw.crop[:, 2:],
        "flip": draw.flip.astype(np.int32),
    }
    if has_jitter(recipe):
        inputs |= _jitter(recipe, draw, on_gpu)
    if recipe.grayscale:
        inputs["grayscale"] = draw.grayscale
    if recipe.blur:
        inputs["blurred"] = draw.blur_sigma > 0
        inputs |= _blur(recipe, draw, on_gpu)
    if recipe.solarize:
        inputs["solarize"] = draw.solarize
    return inputs


def _jitter(recipe: ViewRecipe, draw: Draws, on_gpu: bool) -> Inputs:
    factors = np.stack([draw.brightness, draw.contrast, draw.saturation, 1 + draw.hue])
    inputs: Inputs = {"jittered": (factors != 1).any(axis=0)}
    if recipe.brightness:
        inputs["brightness"] = draw.brightness
    if recipe.contrast:
        # The graph for a GPU sums in whole steps, that for the CPU in floating point.
        scale = FINE if on_gpu else 1
        inputs["contrast"] = scale * draw.contrast
        inputs["contrast_grey"] = scale * (1 - draw.contrast)
    if recipe.saturation:
        inputs["saturation"] = FINE * draw.saturation
        inputs["saturation_grey"] = FINE * (1 - draw.saturation)
    if recipe.hue:
        inputs |= _rotation(draw.hue)
    return inputs


def _blur(recipe: ViewRecipe, draw: Draws, on_gpu: bool) -> Inputs:
    """Return the blur's sigma and window for a GPU, and the Gaussian's taps for the CPU."""
    # Samples that are not blurred do not reach the operator, but their sigma must be valid.
    sigma = np.where(draw.blur_sigma > 0, draw.blur_sigma, recipe.blur_sigma[1])
    if on_gpu:
        return {"sigma": sigma.astype(np.float32), "window": blur_window(sigma)}
    taps = gaussian_taps(sigma, int(blur_window(recipe.blur_sigma[1])))
    return {"across": taps[:, None, :], "down": taps[:, :, None]}


def gaussian_taps(sigma: NDArray[np.floating[Any]], width: int) -> NDArray[np.float32]:
    """Return Gaussians that are cut off at their window and sum to 1.

    Args:
        sigma: ``(B,)``, in pixels, above 0.
        width: Number of taps: the widest window.

    Returns:
        ``(B, width)``; taps outside of a sample's window are 0.

    >>> [round(float(tap), 3) for tap in gaussian_taps(np.array([0.5]), 7)[0]]
    [0.0, 0.0, 0.106, 0.787, 0.106, 0.0, 0.0]
    """
    away = np.abs(np.arange(width) - width // 2)
    taps: NDArray[np.float64] = np.exp(-0.5 * (away / sigma[:, None]) ** 2)
    taps[away > blur_window(sigma)[:, None] // 2] = 0
    taps /= taps.sum(axis=1, keepdims=True)
    return taps.astype(np.float32)


def _rotation(hue: NDArray[np.float32]) -> Inputs:
    """Split a turn of the hue into whole sixths of a turn and a rest of at most half a sixth.

    A third of a turn renames the channels and half a turn mirrors them between a pixel's least
    and greatest value, so whole sixths cost a choice of planes and a change of sign.  The rest
    moves each channel towards where its neighbour in the direction of the turn has left room.
    """
    sixths = np.rint(6 * hue).astype(np.int64)
    remainder = 6 * hue - sixths
    odd = sixths % 2
    red = -((sixths - 3 * odd) // 2) % 3  # the channel that becomes red
    towards = np.where(remainder < 0, -1, 1)
    order = np.stack([red, red + towards, red - towards]) % 3
    return {
        **{name: row.astype(np.int32) for name, row in zip(PLANES, order, strict=True)},
        "remainder": np.rint(256 * np.abs(remainder)).astype(np.int16),
        "mirrored": odd.astype(np.int16),
        "sign": (1 - 2 * odd).astype(np.int16),
        "backwards": remainder < 0,
    }
