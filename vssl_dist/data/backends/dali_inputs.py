"""The inputs of DALI's graph: draws, as the numbers that its operators need, in one array.

Each feed of DALI costs a search through the graph and a copy, in Python: a recipe of ten views
would have 200.  So all inputs of a sample lie in one row of bytes, from which the graph cuts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.views import Draws, blur_window

GraphInputs = dict[str, NDArray[Any]]
"""One row per sample, by the name of the input; dtypes differ."""
STEPS_PER_LEVEL = 64
"""Steps per level in which contrast and saturation are summed: 2 * 64 * 255 fits into 16 bits."""
HUE_PLANE_INPUTS = ("first", "second", "third")
"""Names of the inputs that say which colour channels the three planes of the hue are."""


class PackedField(NamedTuple):
    """The place of one input in a packed row, and what its bytes mean."""

    first_byte: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def end_byte(self) -> int:
        """The first byte behind it."""
        return self.first_byte + self.dtype.itemsize * math.prod(self.shape)


PackedLayout = Mapping[str, PackedField]


def packed_layout(inputs: GraphInputs) -> PackedLayout:
    """Return where `pack_inputs` puts each input.

    >>> packed_layout({"flip": np.zeros(4, np.int32), "start": np.zeros((4, 2), np.float32)})
    {'flip': PackedField(first_byte=0, shape=(), dtype=dtype('int32')),
     'start': PackedField(first_byte=4, shape=(2,), dtype=dtype('float32'))}
    """
    layout: dict[str, PackedField] = {}
    first_byte = 0
    for name, rows in inputs.items():
        layout[name] = PackedField(first_byte, rows.shape[1:], rows.dtype)
        first_byte = layout[name].end_byte
    return layout


def pack_inputs(inputs: GraphInputs) -> NDArray[np.uint8]:
    """Return the inputs as one row of bytes per sample, ``(B, N)``."""
    num_samples = len(next(iter(inputs.values())))
    return np.concatenate(
        [
            np.ascontiguousarray(rows).reshape(num_samples, -1).view(np.uint8)
            for rows in inputs.values()
        ],
        axis=1,
    )


def view_input_name(view: int, input_name: str) -> str:
    """Return the name of one view's input in the graph."""
    return f"view{view}_{input_name}"


def has_jitter(recipe: ViewRecipe) -> bool:
    """Whether the colour jitter of a recipe ever changes anything."""
    jitter_strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return recipe.jitter > 0 and max(jitter_strengths) > 0


def inputs_of_all_views(spec: BackendSpec, draws: Sequence[Draws]) -> GraphInputs:
    """Return the inputs of the graph of all views, for one `Draws` per recipe."""
    return {
        view_input_name(view, input_name): value
        for view, (recipe, view_draws) in enumerate(zip(spec.recipes, draws, strict=True))
        for input_name, value in inputs_of_one_view(
            recipe, view_draws, spec.device != "cpu"
        ).items()
    }


def inputs_of_one_view(recipe: ViewRecipe, view_draws: Draws, on_gpu: bool) -> GraphInputs:
    """Return the inputs of one view, named without the view."""
    inputs: GraphInputs = {
        "start": view_draws.crop[:, :2],
        "shape": view_draws.crop[:, 2:],
        "flip": view_draws.flip.astype(np.int32),
    }
    if has_jitter(recipe):
        inputs |= _jitter_inputs(recipe, view_draws, on_gpu)
    if recipe.grayscale:
        inputs["grayscale"] = view_draws.grayscale
    if recipe.blur:
        inputs["blurred"] = view_draws.blur_sigma > 0
        inputs |= _blur_inputs(recipe, view_draws, on_gpu)
    if recipe.solarize:
        inputs["solarize"] = view_draws.solarize
    return inputs


def _jitter_inputs(recipe: ViewRecipe, view_draws: Draws, on_gpu: bool) -> GraphInputs:
    jitter_factors = np.stack(
        [view_draws.brightness, view_draws.contrast, view_draws.saturation, 1 + view_draws.hue]
    )
    inputs: GraphInputs = {"jittered": (jitter_factors != 1).any(axis=0)}
    if recipe.brightness:
        inputs["brightness"] = view_draws.brightness
    if recipe.contrast:
        # The graph for a GPU sums in whole steps, that for the CPU in floating point.
        contrast_scale = STEPS_PER_LEVEL if on_gpu else 1
        inputs["contrast"] = contrast_scale * view_draws.contrast
        inputs["contrast_grey"] = contrast_scale * (1 - view_draws.contrast)
    if recipe.saturation:
        inputs["saturation"] = STEPS_PER_LEVEL * view_draws.saturation
        inputs["saturation_grey"] = STEPS_PER_LEVEL * (1 - view_draws.saturation)
    if recipe.hue:
        inputs |= _hue_inputs(view_draws.hue)
    return inputs


def _blur_inputs(recipe: ViewRecipe, view_draws: Draws, on_gpu: bool) -> GraphInputs:
    """Return the blur's sigma and window for a GPU, and the Gaussian's taps for the CPU."""
    # Samples that are not blurred do not reach the operator, but their sigma must be valid.
    sigma = np.where(view_draws.blur_sigma > 0, view_draws.blur_sigma, recipe.blur_sigma[1])
    if on_gpu:
        return {"sigma": sigma.astype(np.float32), "window": blur_window(sigma)}
    taps = gaussian_taps(sigma, int(blur_window(recipe.blur_sigma[1])))
    return {"across": taps[:, None, :], "down": taps[:, :, None]}


def gaussian_taps(sigma: NDArray[np.floating[Any]], num_taps: int) -> NDArray[np.float32]:
    """Return Gaussians that are cut off at their window and sum to 1.

    Args:
        sigma: ``(B,)``, in pixels, above 0.
        num_taps: Number of taps: the widest window.

    Returns:
        ``(B, num_taps)``; taps outside of a sample's window are 0.

    >>> [round(float(tap), 3) for tap in gaussian_taps(np.array([0.5]), 7)[0]]
    [0.0, 0.0, 0.106, 0.787, 0.106, 0.0, 0.0]
    """
    tap_distances = np.abs(np.arange(num_taps) - num_taps // 2)
    taps: NDArray[np.float64] = np.exp(-0.5 * (tap_distances / sigma[:, None]) ** 2)
    taps[tap_distances > blur_window(sigma)[:, None] // 2] = 0
    taps /= taps.sum(axis=1, keepdims=True)
    return taps.astype(np.float32)


def _hue_inputs(hue_turns: NDArray[np.float32]) -> GraphInputs:
    """Split a turn of the hue into whole sixths of a turn and a rest of at most half a sixth.

    A third of a turn renames the channels and half a turn mirrors them between a pixel's least
    and greatest value, so whole sixths cost a choice of planes and a change of sign.  The rest
    moves each channel towards where its neighbour in the direction of the turn has left room.
    """
    whole_sixths = np.rint(6 * hue_turns).astype(np.int64)
    rest_of_sixth = 6 * hue_turns - whole_sixths
    odd_sixths = whole_sixths % 2
    source_of_red = -((whole_sixths - 3 * odd_sixths) // 2) % 3  # the channel that becomes red
    neighbour_step = np.where(rest_of_sixth < 0, -1, 1)
    plane_channels = (
        np.stack([source_of_red, source_of_red + neighbour_step, source_of_red - neighbour_step])
        % 3
    )
    return {
        **{
            name: row.astype(np.int32)
            for name, row in zip(HUE_PLANE_INPUTS, plane_channels, strict=True)
        },
        "remainder": np.rint(256 * np.abs(rest_of_sixth)).astype(np.int16),
        "mirrored": odd_sixths.astype(np.int16),
        "sign": (1 - 2 * odd_sixths).astype(np.int16),
        "backwards": rest_of_sixth < 0,
    }
