"""A linear classifier of features, as values: trained beside a method or on frozen features."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scaling(NamedTuple):
    """Mean and standard deviation of each feature, ``(D,)``; 1 where it never varies."""

    mean: Tensor
    std: Tensor


class Probe(NamedTuple):
    """Logits are ``features @ weight + bias``: ``(D, C)`` and ``(C,)``, of raw features."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of_scaled(cls, weight: Tensor, bias: Tensor, scaling: Scaling) -> Probe:
        """The probe of raw features that equals one of scaled features."""
        raw = weight / scaling.std.to(weight)[:, None]
        return cls(raw, bias - scaling.mean.to(weight) @ raw)

    @property
    def finite(self) -> bool:
        """Whether its training has not diverged."""
        return bool(self.weight.isfinite().all() and self.bias.isfinite().all())

    def logits(self, features: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, C)``."""
        return features.to(self.weight) @ self.weight + self.bias
