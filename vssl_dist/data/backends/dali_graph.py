"""The graph that makes views with NVIDIA DALI, on the CPU and on a GPU.

The parameters come from outside (`views.draw`), so the graph holds no random operator, no
reader and no state.  Every operation is that of `reference`, on whole levels up to the last
step; docs/parity.md lists the differences.  Contrast, saturation and hue are built from simpler
ones: DALI's own contrast pivots about middle grey instead of the image's own, its hue turns
linearly about the grey axis, and its saturation takes three times as long.

DALI rewrites these functions: an ``if`` on a node parts the batch, sample by sample, so an
operation costs nothing for the samples that it was not drawn for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from nvidia.dali import fn, math, types

from vssl_dist.config import Normalisation, ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.dali_decoder import DaliNode
from vssl_dist.data.backends.dali_inputs import (
    HUE_PLANE_INPUTS,
    PackedLayout,
    has_jitter,
    view_input_name,
)

ViewInput = Callable[[str], DaliNode]
_TYPES = {
    np.dtype(np.float32): types.FLOAT,
    np.dtype(np.int32): types.INT32,
    np.dtype(np.int16): types.INT16,
    np.dtype(np.bool_): types.BOOL,
}

_LINEAR_RESIZING = {"interp_type": types.INTERP_LINEAR, "antialias": True}
# DALI rounds where torchvision truncates; half a level less, and whole levels stay themselves.
_TRUNCATING_SHIFT = -0.498 / 255


class PackedRows(NamedTuple):
    """The node of all packed inputs, from which the graph cuts each by its name."""

    node: DaliNode
    layout: PackedLayout

    def cut(self, name: str) -> DaliNode:
        """Return the node of one input."""
        field = self.layout[name]
        return fn.reinterpret(
            self.node[field.first_byte : field.end_byte],
            dtype=_TYPES[field.dtype],
            shape=list(field.shape),
        )


def decoding_graph(image: DaliNode, rows: PackedRows, spec: BackendSpec) -> list[DaliNode]:
    """Output the decoded image unchanged."""
    return [image]


def resized_box_graph(image: DaliNode, rows: PackedRows, spec: BackendSpec) -> list[DaliNode]:
    """Output the region from ``start`` to ``end`` (inputs, in pixels), resized and normalised."""
    side_pixels = spec.image_size
    x = fn.resize(
        image,
        size=[side_pixels, side_pixels],
        roi_start=rows.cut("start"),
        roi_end=rows.cut("end"),
        **_LINEAR_RESIZING,
    )
    return [_normalise_and_flip(x, spec.normalise, 0)]


def all_views_graph(image: DaliNode, rows: PackedRows, spec: BackendSpec) -> list[DaliNode]:
    """Output all views of the image, normalised; inputs: `dali_inputs.inputs_of_all_views`."""
    view_nodes = []
    for view_number in range(len(spec.recipes)):  # the rewriting does not reach into comprehensions
        view_nodes.append(_make_view_node(image, rows, view_number, spec))  # noqa: PERF401
    return view_nodes


def _make_view_node(
    image: DaliNode, rows: PackedRows, view_number: int, spec: BackendSpec
) -> DaliNode:
    """Make one view of an HWC uint8 image, without the operations that are never drawn."""
    recipe = spec.recipes[view_number]
    side_pixels = spec.side(recipe)

    def view_input(input_name: str) -> DaliNode:
        return rows.cut(view_input_name(view_number, input_name))

    # Cut before resizing: a region of interest would let pixels from outside the crop blend in.
    x = fn.slice(image, start=view_input("start"), shape=view_input("shape"), axes=(0, 1))
    x = fn.resize(x, size=[side_pixels, side_pixels], **_LINEAR_RESIZING)
    if has_jitter(recipe) and view_input("jittered"):
        x = _jitter_colours(x, recipe, spec, view_input)
    if recipe.grayscale and view_input("grayscale"):
        x = fn.color_space_conversion(_to_grey(x), image_type=types.GRAY, output_type=types.RGB)
    if recipe.blur and view_input("blurred"):
        x = _blur(x, spec, view_input)
    if recipe.solarize and view_input("solarize"):
        x = math.min(x, types.Constant(255, dtype=types.UINT8) - x)
    return _normalise_and_flip(x, spec.normalise, view_input("flip"))


def _blur(x: DaliNode, spec: BackendSpec, view_input: ViewInput) -> DaliNode:
    """Convolve with a Gaussian."""
    # On the CPU DALI's own blur takes five times as long as two filters.
    if spec.device != "cpu":
        return fn.gaussian_blur(x, sigma=view_input("sigma"), window_size=view_input("window"))
    return fn.filter(fn.filter(x, view_input("across")), view_input("down"))


def _jitter_colours(
    x: DaliNode, recipe: ViewRecipe, spec: BackendSpec, view_input: ViewInput
) -> DaliNode:
    """Change brightness, contrast, saturation and hue, each cut off to whole levels."""
    if recipe.brightness:
        x = fn.brightness(
            x, brightness=view_input("brightness"), brightness_shift=_TRUNCATING_SHIFT
        )
    if recipe.contrast:
        x = _change_contrast(x, spec, view_input)
    if recipe.saturation == 0 and recipe.hue == 0:
        return x
    channel_planes = _change_saturation(x, recipe, view_input)
    if recipe.hue:
        channel_planes = _turn_hue(channel_planes, view_input)
    red, green, blue = (
        fn.cast(channel_plane, dtype=types.UINT8) for channel_plane in channel_planes
    )
    return fn.reshape(fn.stack(red, green, blue, axis=2), layout="HWC")


def _change_contrast(x: DaliNode, spec: BackendSpec, view_input: ViewInput) -> DaliNode:
    """Blend an image with the mean of its grey image."""
    # The mean of the grey image rounded down, of which there is only the rounded one.
    grey = (fn.reductions.mean(_to_grey(x)) - 0.5) * view_input("contrast_grey")
    if spec.device == "cpu":
        grey_shift = grey / 255.0 + _TRUNCATING_SHIFT
        return fn.brightness(x, brightness=view_input("contrast"), brightness_shift=grey_shift)
    # A parameter of an operator must not come from the GPU: the same in whole 64ths.
    x = fn.brightness(x, brightness=view_input("contrast"), dtype=types.INT16)
    return fn.cast((x + fn.cast(grey, dtype=types.INT16)) >> _int16_constant(6), dtype=types.UINT8)


def _change_saturation(x: DaliNode, recipe: ViewRecipe, view_input: ViewInput) -> list[DaliNode]:
    """Return the channels as planes of whole levels in 16 bits, in the order that the hue needs."""
    channel_order = [view_input(name) for name in HUE_PLANE_INPUTS] if recipe.hue else [0, 1, 2]
    if recipe.saturation == 0:
        x = fn.transpose(fn.cast(x, dtype=types.INT16), perm=[2, 0, 1])
        return [x[channel_order[0]], x[channel_order[1]], x[channel_order[2]]]
    grey = fn.brightness(_to_grey(x), brightness=view_input("saturation_grey"), dtype=types.INT16)
    grey = fn.squeeze(grey, axes=2)
    x = fn.brightness(x, brightness=view_input("saturation"), dtype=types.INT16)
    x = fn.transpose(x, perm=[2, 0, 1])
    channel_planes = []
    for channel in channel_order:
        channel_plane = (x[channel] + grey) >> _int16_constant(6)
        channel_planes.append(
            math.max(math.min(channel_plane, _int16_constant(255)), _int16_constant(0))
        )
    return channel_planes


def _turn_hue(channel_planes: list[DaliNode], view_input: ViewInput) -> list[DaliNode]:
    """Turn the hue of HSV, which DALI itself does not offer; see `dali_inputs` for the inputs.

    Between its least and its greatest value a pixel has one middle channel, and a turn by t
    sixths moves that one by t times their distance, as far as there is room; the rest moves
    the next channel.  In terms of each channel and its neighbour this needs no hue at all.
    """
    a, b, c = channel_planes
    highest, lowest = math.max(math.max(a, b), c), math.min(math.min(a, b), c)
    turn_step = ((highest - lowest) * view_input("remainder")) >> _int16_constant(8)
    lowest_turned, highest_turned = lowest + turn_step, highest - turn_step
    mirrored_sum, plane_sign = (highest + lowest) * view_input("mirrored"), view_input("sign")
    turned_planes = []
    for channel, neighbour_plane in ((a, b), (b, c), (c, a)):
        # How far the neighbour leaves room: all of the step where it lies at the other end.
        clipped_neighbour = math.max(lowest_turned, math.min(highest_turned, neighbour_plane))
        channel_plane = math.max(
            math.min(clipped_neighbour + channel - neighbour_plane, highest), lowest
        )
        turned_planes.append(mirrored_sum + channel_plane * plane_sign)
    red, green, blue = turned_planes
    if view_input("backwards"):
        green, blue = blue, green
    return [red, green, blue]


def _to_grey(x: DaliNode) -> DaliNode:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _int16_constant(value: int) -> DaliNode:
    return types.Constant(value, dtype=types.INT16)


def _normalise_and_flip(
    x: DaliNode, normalise: Normalisation, is_flipped: DaliNode | int
) -> DaliNode:
    return fn.crop_mirror_normalize(
        x,
        mirror=is_flipped,
        mean=[255 * channel_mean for channel_mean in normalise.mean],
        std=[255 * channel_std for channel_std in normalise.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )
