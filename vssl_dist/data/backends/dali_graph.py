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

from nvidia.dali import fn, math, types

from vssl_dist.config import Normalisation, ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.dali_decoder import Node
from vssl_dist.data.backends.dali_inputs import (
    PLANES,
    has_jitter,
    source_name,
)

Source = Callable[[str], Node]

_LINEAR = {"interp_type": types.INTERP_LINEAR, "antialias": True}
# DALI rounds where torchvision truncates; half a level less, and whole levels stay themselves.
_TRUNCATED = -0.498 / 255


def decode_only_graph(image: Node, spec: BackendSpec) -> list[Node]:
    """Output the decoded image unchanged."""
    return [image]


def frame_graph(image: Node, spec: BackendSpec) -> list[Node]:
    """Output the region from ``start`` to ``end`` (inputs, in pixels), resized and normalised."""
    side = spec.image_size
    start, end = fn.external_source(name="start"), fn.external_source(name="end")
    x = fn.resize(image, size=[side, side], roi_start=start, roi_end=end, **_LINEAR)
    return [_normalised(x, spec.normalise, 0)]


def view_graph(image: Node, spec: BackendSpec) -> list[Node]:
    """Output all views of the image, normalised; `dali_inputs.graph_inputs` makes their inputs."""
    outputs = []
    for number in range(len(spec.recipes)):  # the rewriting does not reach into comprehensions
        outputs.append(_view(image, number, spec))  # noqa: PERF401
    return outputs


def _view(image: Node, number: int, spec: BackendSpec) -> Node:
    """Make one view of an HWC uint8 image, without the operations that are never drawn."""
    recipe = spec.recipes[number]
    side = spec.side(recipe)

    def source(key: str) -> Node:
        return fn.external_source(name=source_name(number, key))

    # Cut before resizing: a region of interest would let pixels from outside the crop blend in.
    x = fn.slice(image, start=source("start"), shape=source("shape"), axes=(0, 1))
    x = fn.resize(x, size=[side, side], **_LINEAR)
    if has_jitter(recipe) and source("jittered"):
        x = _jitter(x, recipe, spec, source)
    if recipe.grayscale and source("grayscale"):
        x = fn.color_space_conversion(_grey(x), image_type=types.GRAY, output_type=types.RGB)
    if recipe.blur and source("blurred"):
        x = _blurred(x, spec, source)
    if recipe.solarize and source("solarize"):
        x = math.min(x, types.Constant(255, dtype=types.UINT8) - x)
    return _normalised(x, spec.normalise, source("flip"))


def _blurred(x: Node, spec: BackendSpec, source: Source) -> Node:
    """Convolve with a Gaussian."""
    # On the CPU DALI's own blur takes five times as long as two filters.
    if spec.device != "cpu":
        return fn.gaussian_blur(x, sigma=source("sigma"), window_size=source("window"))
    return fn.filter(fn.filter(x, source("across")), source("down"))


def _jitter(x: Node, recipe: ViewRecipe, spec: BackendSpec, source: Source) -> Node:
    """Change brightness, contrast, saturation and hue, each cut off to whole levels."""
    if recipe.brightness:
        x = fn.brightness(x, brightness=source("brightness"), brightness_shift=_TRUNCATED)
    if recipe.contrast:
        x = _contrasted(x, spec, source)
    if recipe.saturation == 0 and recipe.hue == 0:
        return x
    planes = _saturated(x, recipe, source)
    if recipe.hue:
        planes = _turned(planes, source)
    red, green, blue = (fn.cast(plane, dtype=types.UINT8) for plane in planes)
    return fn.reshape(fn.stack(red, green, blue, axis=2), layout="HWC")


def _contrasted(x: Node, spec: BackendSpec, source: Source) -> Node:
    """Blend an image with the mean of its grey image."""
    # The mean of the grey image rounded down, of which there is only the rounded one.
    grey = (fn.reductions.mean(_grey(x)) - 0.5) * source("contrast_grey")
    if spec.device == "cpu":
        shift = grey / 255.0 + _TRUNCATED
        return fn.brightness(x, brightness=source("contrast"), brightness_shift=shift)
    # A parameter of an operator must not come from the GPU: the same in whole 64ths.
    x = fn.brightness(x, brightness=source("contrast"), dtype=types.INT16)
    return fn.cast((x + fn.cast(grey, dtype=types.INT16)) >> _int16(6), dtype=types.UINT8)


def _saturated(x: Node, recipe: ViewRecipe, source: Source) -> list[Node]:
    """Return the channels as planes of whole levels in 16 bits, in the order that the hue needs."""
    order = [source(name) for name in PLANES] if recipe.hue else [0, 1, 2]
    if recipe.saturation == 0:
        x = fn.transpose(fn.cast(x, dtype=types.INT16), perm=[2, 0, 1])
        return [x[order[0]], x[order[1]], x[order[2]]]
    grey = fn.brightness(_grey(x), brightness=source("saturation_grey"), dtype=types.INT16)
    grey = fn.squeeze(grey, axes=2)
    x = fn.brightness(x, brightness=source("saturation"), dtype=types.INT16)
    x = fn.transpose(x, perm=[2, 0, 1])
    planes = []
    for channel in order:
        plane = (x[channel] + grey) >> _int16(6)
        planes.append(math.max(math.min(plane, _int16(255)), _int16(0)))
    return planes


def _turned(planes: list[Node], source: Source) -> list[Node]:
    """Turn the hue of HSV, which DALI itself does not offer; see `dali_inputs` for the inputs.

    Between its least and its greatest value a pixel has one middle channel, and a turn by t
    sixths moves that one by t times their distance, as far as there is room; the rest moves
    the next channel.  In terms of each channel and its neighbour this needs no hue at all.
    """
    a, b, c = planes
    top, low = math.max(math.max(a, b), c), math.min(math.min(a, b), c)
    step = ((top - low) * source("remainder")) >> _int16(8)
    reach, ceiling = low + step, top - step
    mirror, sign = (top + low) * source("mirrored"), source("sign")
    turned = []
    for channel, neighbour in ((a, b), (b, c), (c, a)):
        # How far the neighbour leaves room: all of the step where it lies at the other end.
        bound = math.max(reach, math.min(ceiling, neighbour))
        plane = math.max(math.min(bound + channel - neighbour, top), low)
        turned.append(mirror + plane * sign)
    red, green, blue = turned
    if source("backwards"):
        green, blue = blue, green
    return [red, green, blue]


def _grey(x: Node) -> Node:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _int16(value: int) -> Node:
    return types.Constant(value, dtype=types.INT16)


def _normalised(x: Node, normalise: Normalisation, mirror: Node | int) -> Node:
    return fn.crop_mirror_normalize(
        x,
        mirror=mirror,
        mean=[255 * m for m in normalise.mean],
        std=[255 * s for s in normalise.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )
