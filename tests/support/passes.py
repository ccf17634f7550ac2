"""Networks for passes over images in other processes, which import this module alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.evaluation.features.extract import FeatureFunction, flatten_pixels

Image = NDArray[np.float32]


def pixels() -> FeatureFunction:
    """No network."""
    return flatten_pixels


def slow() -> FeatureFunction:
    """No network, and half a second for each batch."""

    def forward(images: Tensor) -> Tensor:
        time.sleep(0.5)
        return flatten_pixels(images)

    return forward


def fatal(first: Image) -> FeatureFunction:
    """Kills its process at the batch that begins with an image."""
    return _at(first, lambda: os.kill(os.getpid(), signal.SIGKILL))


def broken(first: Image) -> FeatureFunction:
    """Raises what nobody expects at the batch that begins with an image."""

    def fail() -> None:
        raise AssertionError("a mistake in the network")

    return _at(first, fail)


def _at(first: Image, happen: Callable[[], None]) -> FeatureFunction:
    def forward(images: Tensor) -> Tensor:
        if np.array_equal(images[0].numpy(), first):
            happen()
        return flatten_pixels(images)

    return forward
