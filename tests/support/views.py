"""Two views of tiny synthetic images, and noise that is what the test says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vssl_dist.methods.base import MicroStep, Noise


def two_views(batch: int = 8, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth random images seen twice: other brightness, a little noise, perhaps mirrored."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")

    def view() -> Tensor:
        gain = 0.8 + 0.4 * torch.rand(batch, 3, 1, 1, generator=generator)
        seen = images * gain + 0.1 * torch.randn(images.shape, generator=generator)
        mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, seen.flip(-1), seen)

    return view(), view()


def at(epoch: float, noise: Noise) -> MicroStep:
    """What a loss without labels may know after ``epoch`` epochs."""
    return MicroStep(noise, epoch, torch.zeros(0, dtype=torch.int64))


class NoNoise:
    """Every draw is zero."""

    def normal(self, branch: str, shape: Sequence[int]) -> Tensor:
        return torch.zeros(*shape)


class SameNoise:
    """Every branch gets the same draws: the loss is then symmetric in the views."""

    def normal(self, branch: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(5))
