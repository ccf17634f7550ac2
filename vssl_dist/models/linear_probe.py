"""A linear classifier of features, as values: trained beside a method or on frozen features."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scaling(NamedTuple):
    """Mean and standard deviation of each feature, ``(D,)``; 1 where it never varies."""

    mean: Tensor
    std: Tensor


class Probe(NamedTuple):
    """A linear classifier of raw features: ``features @ weight + bias``.

    ``weight`` is ``(D, C)``, ``bias`` is ``(C,)``.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of_scaled(cls, weight: Tensor, bias: Tensor, scaling: Scaling) -> Probe:
        """Make the probe of raw features that equals one of scaled features."""
        # ((x - mean) / std) @ weight + bias, multiplied out.
        raw_weight = weight / scaling.std.to(weight)[:, None]
        return cls(raw_weight, bias - scaling.mean.to(weight) @ raw_weight)

    @property
    def is_finite(self) -> bool:
        """Whether the weights are finite: the probe's training has not diverged."""
        return bool(self.weight.isfinite().all() and self.bias.isfinite().all())

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits ``(B, C)`` of features ``(B, D)``."""
        return features.to(self.weight) @ self.weight + self.bias
