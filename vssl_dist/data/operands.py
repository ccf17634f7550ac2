"""What DALI's graph takes from outside: draws, as the numbers that its operators want."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vssl_dist.config import ViewRecipe
from vssl_dist.data.views import Draws, blur_window

# Thresholds of solarisation: the second is never reached.
_SOLARIZE_FROM, _NEVER = 128.0, 1000.0


def source_name(view: int, key: str) -> str:
    """Name of one view's input in the graph."""
    return f"view{view}_{key}"


def jitters(recipe: ViewRecipe, strength: float) -> bool:
    """Whether a part of the colour jitter, of this strength, ever does anything."""
    return recipe.jitter > 0 and strength > 0


def inputs(recipe: ViewRecipe, draw: Draws) -> dict[str, NDArray[Any]]:
    """What the graph of ``recipe`` takes from outside, one row per sample."""
    feed: dict[str, NDArray[Any]] = {
        "start": draw.crop[:, :2],
        "shape": draw.crop[:, 2:],
        "flip": draw.flip.astype(np.int32),
    }
    for name in ("brightness", "contrast", "saturation"):
        if jitters(recipe, getattr(recipe, name)):
            feed[name] = getattr(draw, name)
    if jitters(recipe, recipe.hue):
        feed["sectors"] = _sectors(draw.hue)
    if recipe.grayscale:
        feed["colour"] = 1 - draw.grayscale.astype(np.float32)
    if recipe.blur:
        # A window of one pixel is no blur; its sigma must only be valid.
        feed["sigma"] = np.where(draw.blur_sigma > 0, draw.blur_sigma, 1).astype(np.float32)
        feed["window"] = blur_window(draw.blur_sigma)
    if recipe.solarize:
        feed["threshold"] = np.where(draw.solarize, _SOLARIZE_FROM, _NEVER).astype(np.float32)
    return feed


def _sectors(hue: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where each channel's wave over the hue begins: ``(B, 3, 1, 1)``, in sixths of a turn.

    Green has two choices, a whole turn apart, of which one stays within reach of the two folds.
    """
    starts = [6 * hue - 3, 6 * hue + np.where(hue < 0, 1, -5), 6 * hue - 1]
    return np.stack(starts, axis=1).astype(np.float32)[:, :, None, None]
