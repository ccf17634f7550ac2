"""Features of images with their labels, and the accuracy of what classifies them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """What a network makes of ``N`` images, in the order of their ids.

    ``features`` is ``(N, D)`` of any floating dtype, ``labels`` is ``(N,)`` int64 and counts
    from 0; both on the CPU.
    """

    features: Tensor
    labels: Tensor


class Accuracy(NamedTuple):
    """Shares of the queries whose class had the most votes, or was among the first five."""

    top1: float
    top5: float
