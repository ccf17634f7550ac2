"""What stands on a backbone: projectors, predictors, posteriors, and the branches they form.

Every branch does everything trainable in one ``forward`` per view, so that a single wrapper (the
engine) sees all of it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn


def mlp(*sizes: int, normalise_output: bool = False) -> nn.Sequential:
    """Linear-BN-ReLU layers and a bare last Linear: ``mlp(2048, 4096, 256)``.

    Args:
        sizes: Widths from the input to the output, at least two.
        normalise_output: End with a batch norm without scale and shift.

    >>> len(mlp(8, 4, 2)), len(mlp(8, 4, 2, normalise_output=True))
    (4, 5)
    """
    layers: list[nn.Module] = []
    *hidden, (last_in, last_out) = pairwise(sizes)
    for n_in, n_out in hidden:
        # A bias before a batch norm is subtracted again.
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(last_in, last_out, bias=not normalise_output))
    if normalise_output:
        layers.append(nn.BatchNorm1d(last_out, affine=False))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """A bare backbone: ``(B, 3, H, W) -> (B, D)``."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, view: Tensor) -> Tensor:
        embedding: Tensor = self.backbone(view)
        return embedding


class Projection(NamedTuple):
    """What a `ProjectionBranch` says about a view."""

    h: Tensor
    """Embedding: the backbone's output ``(B, width)``."""
    z: Tensor
    """Projection ``(B, D)``."""
    p: Tensor
    """Prediction ``(B, D)``; the projection itself where there is no predictor."""


class ProjectionBranch(nn.Module):
    """backbone -> projector -> predictor (a teacher has none)."""

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def forward(self, view: Tensor) -> Projection:
        h = self.backbone(view)
        z = self.projector(h)
        return Projection(h, z, z if self.predictor is None else self.predictor(z))


class Gaussian(NamedTuple):
    """A diagonal Gaussian per image, and the embedding that it was inferred from."""

    h: Tensor
    """Embedding: the backbone's output ``(B, width)``."""
    mu: Tensor
    """Mean ``(B, D)``."""
    logvar: Tensor
    """Logarithm of the variance ``(B, D)``, not yet bounded."""


class GaussianBranch(nn.Module):
    """backbone -> posterior, whose ``2 D`` outputs are mean and log-variance.

    A predictor, where there is one, transforms the mean only.
    """

    def __init__(
        self, backbone: nn.Module, posterior: nn.Module, predictor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.posterior = posterior
        self.predictor = predictor

    def forward(self, view: Tensor) -> Gaussian:
        h = self.backbone(view)
        mu, logvar = self.posterior(h).chunk(2, dim=-1)
        return Gaussian(h, mu if self.predictor is None else self.predictor(mu), logvar)
