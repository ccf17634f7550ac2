"""Views with PIL and torchvision: defines every operation, and works where DALI has no wheel.

The operations are torchvision's (v2 functional, on uint8 tensors) in the order of the recipe.
DALI is held against this file, so it is written to be believed rather than to be fast.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vssl_dist.data.backends.base import (
    BackendSpec,
    Placement,
    UndecodableError,
)
from vssl_dist.data.backends.fault import DeviceError, is_device_failure
from vssl_dist.data.backends.memory import error_cause
from vssl_dist.data.bare import strip_metadata
from vssl_dist.data.store.dataset import Samples
from vssl_dist.data.store.header import pixel_count
from vssl_dist.data.views import Draws, blur_window
from vssl_dist.vision import torchvision

SOLARIZE_FROM = 128

T = TypeVar("T")
Box = tuple[float, float, float, float]


def decode(data: NDArray[np.uint8]) -> Image.Image:
    """Decode an image as it is stored, in RGB; metadata such as the orientation are ignored.

    Raises:
        ValueError: The bytes are not a whole image.
        DeviceError: There is no memory left.
    """
    try:
        with Image.open(io.BytesIO(strip_metadata(data.tobytes()))) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # its message names an address in memory
        raise ValueError("no format that Pillow knows") from error
    except Exception as error:  # PIL promises no common class: OSError, SyntaxError, struct.error
        if is_device_failure(error, pixel_count(data)):
            raise DeviceError(torch.device("cpu"), error_cause(error)) from error
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from error


class ReferenceBackend:
    """A `Backend` of PIL and torchvision, which release the interpreter lock for its threads."""

    def __init__(self, spec: BackendSpec) -> None:
        torchvision()
        self._functional = import_module("torchvision.transforms.v2.functional")
        self._spec = spec
        self._placement = Placement(spec.device)

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        def views(image: Image.Image, row: int) -> list[Tensor]:
            return [
                self._view(image, self._spec.side(recipe), view_draws.take(row))
                for recipe, view_draws in zip(self._spec.recipes, draws, strict=True)
            ]

        rows = self._map(samples, views)
        return [self._finish([row[view] for row in rows]) for view in range(len(draws))]

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        def resized_box(image: Image.Image, row: int) -> Tensor:
            top, left, height, width = boxes[row].tolist()
            box = (left, top, left + width, top + height)
            return _resized(image, self._spec.image_size, box)

        return self._finish(self._map(samples, resized_box))

    def _map(self, samples: Samples, make: Callable[[Image.Image, int], T]) -> list[T]:
        """Decode all images and call ``make`` with each and its row."""
        make_row = partial(_try, samples, make)
        rows = range(len(samples.data))
        if self._spec.threads == 1:
            results = [make_row(row) for row in rows]
        else:
            with ThreadPoolExecutor(self._spec.threads) as pool:
                results = list(pool.map(make_row, rows))
        reasons = {row: result[1] for row, result in enumerate(results) if result[1]}
        if reasons:
            raise UndecodableError(reasons)
        return [result[0][0] for result in results]

    def _view(self, image: Image.Image, side: int, draw: Draws) -> Tensor:
        """Make one view of one image; ``draw`` holds scalars."""
        f: Any = self._functional
        # Cropped first: resizing a box would let pixels from outside the crop blend in.
        top, left, height, width = draw.crop.tolist()
        x = _resized(image.crop((left, top, left + width, top + height)), side)
        if draw.flip:
            x = f.horizontal_flip(x)
        if draw.brightness != 1:
            x = f.adjust_brightness(x, float(draw.brightness))
        if draw.contrast != 1:
            x = f.adjust_contrast(x, float(draw.contrast))
        if draw.saturation != 1:
            x = f.adjust_saturation(x, float(draw.saturation))
        if draw.hue != 0:
            x = f.adjust_hue(x, float(draw.hue))
        if draw.grayscale:
            x = f.rgb_to_grayscale(x, num_output_channels=3)
        if draw.blur_sigma > 0:
            window, sigma = int(blur_window(draw.blur_sigma)), float(draw.blur_sigma)
            x = f.gaussian_blur(x, [window, window], [sigma, sigma])
        if draw.solarize:
            x = f.solarize(x, SOLARIZE_FROM)
        return x

    def _finish(self, images: list[Tensor]) -> Tensor:
        normalise = self._spec.normalise
        mean = torch.tensor(normalise.mean, dtype=torch.float32).reshape(3, 1, 1)
        std = torch.tensor(normalise.std, dtype=torch.float32).reshape(3, 1, 1)
        x = (torch.stack(images).float() / 255 - mean) / std
        if self._placement.device.type == "cpu":
            return x
        with self._placement.scope():
            return x.pin_memory().to(self._placement.device, non_blocking=True)


def _resized(image: Image.Image, side: int, box: Box | None = None) -> Tensor:
    resized = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _try(samples: Samples, make: Callable[[Image.Image, int], T], row: int) -> tuple[list[T], str]:
    """Return ``[result]`` and "", or no result and why the image does not decode."""
    try:
        image = decode(samples.data[row])
    except ValueError as error:
        return [], str(error)
    index_size = (int(samples.width[row]), int(samples.height[row]))
    if image.size != index_size:  # the crop was drawn for another image
        return [], f"is {image.size} pixels where the index says {index_size}"
    return [make(image, row)], ""
