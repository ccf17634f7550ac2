"""Features of images with their labels, and the accuracy of what classifies them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LabelledFeatures(NamedTuple):
    """Features of ``N`` images with their labels, in the order of the images' ids.

    ``features`` is ``(N, D)`` of any floating dtype, ``labels`` is ``(N,)`` int64 and counts
    from 0; both on the CPU.
    """

    features: Tensor
    labels: Tensor


class TopAccuracy(NamedTuple):
    """Shares of the queries whose class had the most votes, or was among the first five."""

    top1: float
    top5: float
