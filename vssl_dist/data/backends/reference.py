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
    DevicePlacement,
    UndecodableError,
)
from vssl_dist.data.backends.fault import DeviceError, is_device_failure
from vssl_dist.data.backends.memory import error_cause
from vssl_dist.data.bare import strip_metadata
from vssl_dist.data.store.dataset import Samples
from vssl_dist.data.store.header import header_pixel_count
from vssl_dist.data.views import Draws, blur_window
from vssl_dist.vision import torchvision

SOLARIZE_THRESHOLD = 128

T = TypeVar("T")
PixelBox = tuple[float, float, float, float]


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
        if is_device_failure(error, header_pixel_count(data)):
            raise DeviceError(torch.device("cpu"), error_cause(error)) from error
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from error


class ReferenceBackend:
    """A `Backend` of PIL and torchvision, which release the interpreter lock for its threads."""

    def __init__(self, spec: BackendSpec) -> None:
        torchvision()
        self._torchvision_functional = import_module("torchvision.transforms.v2.functional")
        self._spec = spec
        self._placement = DevicePlacement(spec.device)

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        def make_views(image: Image.Image, row: int) -> list[Tensor]:
            return [
                self._make_view(image, self._spec.side(recipe), view_draws.take(row))
                for recipe, view_draws in zip(self._spec.recipes, draws, strict=True)
            ]

        rows = self._map_decoded(samples, make_views)
        return [self._normalise_stack([row[view] for row in rows]) for view in range(len(draws))]

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        def resize_box(image: Image.Image, row: int) -> Tensor:
            top, left, height, width = boxes[row].tolist()
            box = (left, top, left + width, top + height)
            return _resize_to_tensor(image, self._spec.image_size, box)

        return self._normalise_stack(self._map_decoded(samples, resize_box))

    def _map_decoded(
        self, samples: Samples, make_result: Callable[[Image.Image, int], T]
    ) -> list[T]:
        """Decode all images and call ``make_result`` with each and its row."""
        make_row_result = partial(_decode_and_make, samples, make_result)
        rows = range(len(samples.data))
        if self._spec.threads == 1:
            row_results = [make_row_result(row) for row in rows]
        else:
            with ThreadPoolExecutor(self._spec.threads) as thread_pool:
                row_results = list(thread_pool.map(make_row_result, rows))
        reason_by_row = {
            row: row_result[1] for row, row_result in enumerate(row_results) if row_result[1]
        }
        if reason_by_row:
            raise UndecodableError(reason_by_row)
        return [row_result[0][0] for row_result in row_results]

    def _make_view(self, image: Image.Image, side: int, view_draws: Draws) -> Tensor:
        """Make one view of one image; ``view_draws`` holds scalars."""
        functional: Any = self._torchvision_functional
        # Cropped first: resizing a box would let pixels from outside the crop blend in.
        top, left, height, width = view_draws.crop.tolist()
        x = _resize_to_tensor(image.crop((left, top, left + width, top + height)), side)
        if view_draws.flip:
            x = functional.horizontal_flip(x)
        if view_draws.brightness != 1:
            x = functional.adjust_brightness(x, float(view_draws.brightness))
        if view_draws.contrast != 1:
            x = functional.adjust_contrast(x, float(view_draws.contrast))
        if view_draws.saturation != 1:
            x = functional.adjust_saturation(x, float(view_draws.saturation))
        if view_draws.hue != 0:
            x = functional.adjust_hue(x, float(view_draws.hue))
        if view_draws.grayscale:
            x = functional.rgb_to_grayscale(x, num_output_channels=3)
        if view_draws.blur_sigma > 0:
            sigma = float(view_draws.blur_sigma)
            window_side = int(blur_window(sigma))
            x = functional.gaussian_blur(x, [window_side, window_side], [sigma, sigma])
        if view_draws.solarize:
            x = functional.solarize(x, SOLARIZE_THRESHOLD)
        return x

    def _normalise_stack(self, images: list[Tensor]) -> Tensor:
        normalise = self._spec.normalise
        mean = torch.tensor(normalise.mean, dtype=torch.float32).reshape(3, 1, 1)
        std = torch.tensor(normalise.std, dtype=torch.float32).reshape(3, 1, 1)
        x = (torch.stack(images).float() / 255 - mean) / std
        if self._placement.device.type == "cpu":
            return x
        with self._placement.scope():
            return x.pin_memory().to(self._placement.device, non_blocking=True)


def _resize_to_tensor(image: Image.Image, side: int, box: PixelBox | None = None) -> Tensor:
    resized = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _decode_and_make(
    samples: Samples, make_result: Callable[[Image.Image, int], T], row: int
) -> tuple[list[T], str]:
    """Return ``[result]`` and "", or no result and why the image does not decode."""
    try:
        image = decode(samples.data[row])
    except ValueError as error:
        return [], str(error)
    size_in_index = (int(samples.width[row]), int(samples.height[row]))
    if image.size != size_in_index:  # the crop was drawn for another image
        return [], f"is {image.size} pixels where the index says {size_in_index}"
    return [make_result(image, row)], ""
