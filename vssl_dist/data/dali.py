"""Views with NVIDIA DALI: one graph, decoded once, on the CPU or with nvJPEG on the GPU.

The parameters come from outside (`views.draw`), so the graph holds no random operator, no
reader and no state.  Against `reference` every operation agrees up to rounding: brightness is
rounded to whole levels where torchvision truncates, and what follows stays in floating point,
clamped to [0, 255].  Contrast and hue are built from arithmetic, because DALI's own operators
do something else: they pivot about middle grey, and turn linearly about the grey axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from vssl_dist.config import Normalisation, ViewRecipe
from vssl_dist.data.backend import BackendSpec, Placement, UndecodableError
from vssl_dist.data.operands import inputs, jitters, source_name
from vssl_dist.data.shards import Samples
from vssl_dist.data.views import Draws

Node = Any  # DALI's DataNode: a symbolic tensor of the graph
Feed = Mapping[str, Any]

_LINEAR = {"interp_type": types.INTERP_LINEAR, "antialias": True}


class DaliBackend:
    """See `Backend`."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._placement = Placement(spec.device)
        self._views = _Runner(spec, self._placement.device, self._view_graph)
        self._frames = _Runner(spec, self._placement.device, self._frame_graph)

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        feed: dict[str, Any] = {}
        for number, (recipe, draw) in enumerate(zip(self._spec.recipes, draws, strict=True)):
            feed |= {source_name(number, key): value for key, value in inputs(recipe, draw).items()}
        with self._placement.scope():
            return self._views.run(samples.data, feed)

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        with self._placement.scope():
            return self._frames.run(samples.data, {"start": start, "end": end})[0]

    def _view_graph(self, image: Node) -> list[Node]:
        return [
            _view(image, recipe, number, self._spec)
            for number, recipe in enumerate(self._spec.recipes)
        ]

    def _frame_graph(self, image: Node) -> list[Node]:
        side = self._spec.image_size
        start, end = fn.external_source(name="start"), fn.external_source(name="end")
        x = fn.resize(image, size=[side, side], roi_start=start, roi_end=end, **_LINEAR)
        return [_normalised(x, self._spec.normalise)]


def _view(image: Node, recipe: ViewRecipe, number: int, spec: BackendSpec) -> Node:
    """One view; ``image`` is HWC uint8.  Operations that are never drawn are not in the graph."""

    def given(key: str) -> Node:
        return fn.external_source(name=source_name(number, key))

    def operand(key: str) -> Node:
        # Arithmetic wants its operands in one place; arguments of operators stay on the CPU.
        return given(key).gpu() if spec.device.startswith("cuda") else given(key)

    # Cut before resizing: a region of interest would let pixels from outside the crop blend in.
    x = fn.slice(image, start=given("start"), shape=given("shape"), axes=(0, 1))
    x = fn.resize(x, size=[spec.image_size, spec.image_size], **_LINEAR)
    if jitters(recipe, recipe.brightness):
        x = fn.brightness(x, brightness=given("brightness"))
    if jitters(recipe, recipe.contrast):
        # Not DALI's contrast, which pivots about middle grey instead of the image's own.
        grey = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
        factor = operand("contrast")
        x = _clamped(x * factor + fn.reductions.mean(grey) * (1.0 - factor))
    if jitters(recipe, recipe.saturation):
        x = _clamped(fn.saturation(x, saturation=given("saturation"), dtype=types.FLOAT))
    if jitters(recipe, recipe.hue):
        x = _hue(x, operand("sectors"))
    if recipe.grayscale:
        x = fn.saturation(x, saturation=given("colour"), dtype=types.FLOAT)
    if recipe.blur:
        sigma, window = given("sigma"), given("window")
        x = fn.gaussian_blur(x, sigma=sigma, window_size=window, dtype=types.FLOAT)
    if recipe.solarize:
        # Whole levels decide, as in the reference: 127.6 is still 127.
        x = x + (x >= operand("threshold")) * (255.0 - 2.0 * x)
    return _normalised(x, spec.normalise, mirror=given("flip"))


def _clamped(x: Node) -> Node:
    # math.clamp takes twice as long.
    return math.max(math.min(x, 255.0), 0.0)


def _hue(x: Node, sectors: Node) -> Node:
    """Turn the hue of HSV, which DALI itself does not offer; ``x`` is HWC.

    Each channel of a pixel lies between its least and its greatest one by a wave over the hue
    that is flat, falls, is flat and rises again.  Two absolute values fold the circle onto one
    slope of that wave, where modulo and case by case would need twice the operations.
    """
    x = fn.transpose(fn.cast(x, dtype=types.FLOAT), perm=[2, 0, 1])
    r, g, b = x[0:1], x[1:2], x[2:3]
    top, low = math.max(math.max(r, g), b), math.min(math.min(r, g), b)
    chroma = top - low
    # Six times the hue times the chroma, so that grey needs no division.
    by_blue, by_green = r - g + chroma * 4.0, b - r + chroma * 2.0
    turn = by_blue + (g == top) * (by_green - by_blue)
    turn = turn + (r == top) * (g - b - turn)
    folded = math.abs(math.abs(turn + sectors * chroma) - chroma * 3.0)
    turned = low + math.max(math.min(chroma * 2.0 - folded, chroma), 0.0)
    return fn.transpose(turned, perm=[1, 2, 0])


def _normalised(x: Node, normalise: Normalisation, mirror: Node | int = 0) -> Node:
    return fn.crop_mirror_normalize(
        x,
        mirror=mirror,
        mean=[255 * m for m in normalise.mean],
        std=[255 * s for s in normalise.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )


class _Runner:
    """Runs one graph on batch after batch, synchronously: prefetching is the loader's job.

    DALI declares a pipeline invalid after any error, and does not say which image caused it.
    So after one the pipeline is thrown away and the images are decoded one by one.
    """

    def __init__(
        self, spec: BackendSpec, device: torch.device, graph: Callable[[Node], list[Node]]
    ) -> None:
        self._spec = spec
        self._device = device
        self._graph = graph
        self._pipeline: Any = None

    def run(self, data: Sequence[NDArray[np.uint8]], feed: Feed) -> list[Tensor]:
        if self._pipeline is None or self._pipeline.max_batch_size < len(data):
            self._pipeline = self._build(self._graph, len(data))
        try:
            return _run(self._pipeline, {"bytes": list(data)} | dict(feed), self._device)
        except (RuntimeError, ValueError, IndexError):
            self._pipeline = None
            reasons = self._undecodable(data)
            if not reasons:
                raise
            raise UndecodableError(reasons) from None

    def _build(self, graph: Callable[[Node], list[Node]], batch_size: int) -> Any:
        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self._spec.threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            image = fn.decoders.image(
                fn.external_source(name="bytes"),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
            )
            pipeline.set_outputs(*graph(image))
        pipeline.build()
        return pipeline

    def _undecodable(self, data: Sequence[NDArray[np.uint8]]) -> dict[int, str]:
        reasons: dict[int, str] = {}
        probe = None
        for row, image in enumerate(data):
            probe = probe or self._build(lambda decoded: [decoded], 1)
            try:
                probe.feed_input("bytes", [image])
                probe.run()
            except (RuntimeError, ValueError, IndexError) as error:
                probe = None
                reasons[row] = _brief(error)
        return reasons


def _brief(error: Exception) -> str:
    """The line of DALI's report that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i + 1 for i, line in enumerate(lines[:-1]) if line.startswith("encountered")]
    return lines[after[0]] if after else lines[0]


def _run(pipeline: Any, feed: Feed, device: torch.device) -> list[Tensor]:
    for name, values in feed.items():
        pipeline.feed_input(
            name, values if isinstance(values, list) else np.ascontiguousarray(values)
        )
    results = []
    for output in pipeline.run():
        dense = output.as_tensor()
        # DALI reuses its buffers: the views must be copies.
        if device.type == "cpu":
            results.append(torch.from_numpy(np.array(dense)))
            continue
        view = torch.empty(dense.shape(), dtype=torch.float32, device=device)
        feed_ndarray(dense, view, cuda_stream=torch.cuda.current_stream(device))
        results.append(view)
    return results
