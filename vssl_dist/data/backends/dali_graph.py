"""The graph that makes views with NVIDIA DALI, on the CPU and on a GPU.

The parameters come from outside (`views.draw`), so the graph holds no random operator, no
reader and no state.  Every operation is that of `reference`, on whole levels up to the last
step; docs/parity.md has the differences.  Contrast, saturation and hue are built from simpler
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
    jitters,
    source_name,
)

Given = Callable[[str], Node]

_LINEAR = {"interp_type": types.INTERP_LINEAR, "antialias": True}
# DALI rounds where torchvision truncates; half a level less, and whole levels stay themselves.
_TRUNCATED = -0.498 / 255


def only_decoded(image: Node, spec: BackendSpec) -> list[Node]:
    """The image as it is."""
    return [image]


def framed(image: Node, spec: BackendSpec) -> list[Node]:
    """The part of the image from ``start`` to ``end`` (inputs, in pixels), normalised."""
    side = spec.image_size
    start, end = fn.external_source(name="start"), fn.external_source(name="end")
    x = fn.resize(image, size=[side, side], roi_start=start, roi_end=end, **_LINEAR)
    return [_normalised(x, spec.normalise, 0)]


def views(image: Node, spec: BackendSpec) -> list[Node]:
    """All views of the image, normalised; `operands.feed_of` makes what they take."""
    made = []
    for number in range(len(spec.recipes)):  # the rewriting does not reach into comprehensions
        made.append(_view(image, number, spec))  # noqa: PERF401
    return made


def _view(image: Node, number: int, spec: BackendSpec) -> Node:
    """One view; ``image`` is HWC uint8.  Operations that are never drawn are not in the graph."""
    recipe = spec.recipes[number]
    side = spec.side(recipe)

    def given(key: str) -> Node:
        return fn.external_source(name=source_name(number, key))

    # Cut before resizing: a region of interest would let pixels from outside the crop blend in.
    x = fn.slice(image, start=given("start"), shape=given("shape"), axes=(0, 1))
    x = fn.resize(x, size=[side, side], **_LINEAR)
    if jitters(recipe) and given("jittered"):
        x = _jitter(x, recipe, spec, given)
    if recipe.grayscale and given("grayscale"):
        x = fn.color_space_conversion(_grey(x), image_type=types.GRAY, output_type=types.RGB)
    if recipe.blur and given("blurred"):
        x = _blurred(x, spec, given)
    if recipe.solarize and given("solarize"):
        x = math.min(x, types.Constant(255, dtype=types.UINT8) - x)
    return _normalised(x, spec.normalise, given("flip"))


def _blurred(x: Node, spec: BackendSpec, given: Given) -> Node:
    """Convolved with a Gaussian.  On the CPU DALI's own takes five times as long as two filters."""
    if spec.device != "cpu":
        return fn.gaussian_blur(x, sigma=given("sigma"), window_size=given("window"))
    return fn.filter(fn.filter(x, given("across")), given("down"))


def _jitter(x: Node, recipe: ViewRecipe, spec: BackendSpec, given: Given) -> Node:
    """Brightness, contrast, saturation, hue, each cut off to whole levels."""
    if recipe.brightness:
        x = fn.brightness(x, brightness=given("brightness"), brightness_shift=_TRUNCATED)
    if recipe.contrast:
        x = _contrasted(x, spec, given)
    if recipe.saturation == 0 and recipe.hue == 0:
        return x
    planes = _saturated(x, recipe, given)
    if recipe.hue:
        planes = _turned(planes, given)
    red, green, blue = (fn.cast(plane, dtype=types.UINT8) for plane in planes)
    return fn.reshape(fn.stack(red, green, blue, axis=2), layout="HWC")


def _contrasted(x: Node, spec: BackendSpec, given: Given) -> Node:
    """Blended with the mean of its grey image."""
    # The mean of the grey image rounded down, of which there is only the rounded one.
    grey = (fn.reductions.mean(_grey(x)) - 0.5) * given("contrast_grey")
    if spec.device == "cpu":
        shift = grey / 255.0 + _TRUNCATED
        return fn.brightness(x, brightness=given("contrast"), brightness_shift=shift)
    # A parameter of an operator must not come from the GPU: the same in whole 64ths.
    x = fn.brightness(x, brightness=given("contrast"), dtype=types.INT16)
    return fn.cast((x + fn.cast(grey, dtype=types.INT16)) >> _int16(6), dtype=types.UINT8)


def _saturated(x: Node, recipe: ViewRecipe, given: Given) -> list[Node]:
    """The channels, as planes of whole levels in 16 bits, in the order that the hue wants."""
    order = [given(name) for name in PLANES] if recipe.hue else [0, 1, 2]
    if recipe.saturation == 0:
        x = fn.transpose(fn.cast(x, dtype=types.INT16), perm=[2, 0, 1])
        return [x[order[0]], x[order[1]], x[order[2]]]
    grey = fn.brightness(_grey(x), brightness=given("saturation_grey"), dtype=types.INT16)
    grey = fn.squeeze(grey, axes=2)
    x = fn.brightness(x, brightness=given("saturation"), dtype=types.INT16)
    x = fn.transpose(x, perm=[2, 0, 1])
    planes = []
    for channel in order:
        plane = (x[channel] + grey) >> _int16(6)
        planes.append(math.max(math.min(plane, _int16(255)), _int16(0)))
    return planes


def _turned(planes: list[Node], given: Given) -> list[Node]:
    """Turn the hue of HSV, which DALI itself does not offer; see `operands` for the inputs.

    Between its least and its greatest value a pixel has one middle channel, and a turn by t
    sixths moves that one by t times their distance, as far as there is room; the rest moves
    the next channel.  In terms of each channel and its neighbour this needs no hue at all.
    """
    a, b, c = planes
    top, low = math.max(math.max(a, b), c), math.min(math.min(a, b), c)
    step = ((top - low) * given("rest")) >> _int16(8)
    reach, ceiling = low + step, top - step
    mirror, sign = (top + low) * given("mirrored"), given("sign")
    turned = []
    for own, neighbour in ((a, b), (b, c), (c, a)):
        kept = math.max(reach, math.min(ceiling, neighbour))
        plane = math.max(math.min(kept + own - neighbour, top), low)
        turned.append(mirror + plane * sign)
    red, green, blue = turned
    if given("backwards"):
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
