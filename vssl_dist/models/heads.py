"""Heads of a backbone: projectors, predictors, posteriors, and the branches they form.

Every branch does everything trainable in one ``forward`` per view, so that a single wrapper (the
engine) sees all of it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*sizes: int, normalise_output: bool = False, output_bias: bool = True) -> nn.Sequential:
    """Linear-BN-ReLU layers and a bare last Linear: ``mlp(2048, 4096, 256)``.

    Args:
        sizes: Widths from the input to the output, at least two.
        normalise_output: End with a batch norm without scale and shift.
        output_bias: Whether the last Linear has a bias; before a batch norm it has none.

    >>> len(mlp(8, 4, 2)), len(mlp(8, 4, 2, normalise_output=True))
    (4, 5)
    """
    layers: list[nn.Module] = []
    *hidden, (last_in, last_out) = pairwise(sizes)
    for n_in, n_out in hidden:
        # A bias before a batch norm is subtracted again.
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
    bias = output_bias and not normalise_output
    layers.append(nn.Linear(last_in, last_out, bias=bias))
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
    """Output of a `ProjectionBranch` for a view."""

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
    scale_logvar: Tensor | None = None
    """Logarithm of the squared scales ``(B, D)`` of a likelihood with scales of its own, not yet
    bounded; None: they are the variances."""
    radial_scale: Tensor | None = None
    """Learnt scale ``()`` of a radial likelihood; None: it is not learnt."""


class GaussianBranch(nn.Module):
    """backbone -> posterior, whose ``2 D`` outputs are mean and log-variance.

    Args:
        backbone: ``(B, 3, H, W) -> (B, width)``.
        posterior: ``(B, width) -> (B, 2 D)``; ``3 D`` where the likelihood has its own scales.
        predictor: Transforms the mean ``(B, D)`` only.
        own_scales: Whether the last third of the posterior's outputs are those scales.
        radial_scale: Initial value of a learnt radial scale; None: there is none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        posterior: nn.Module,
        predictor: nn.Module | None = None,
        *,
        own_scales: bool = False,
        radial_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.posterior = posterior
        self.predictor = predictor
        self.own_scales = own_scales
        self.log_radial_scale: nn.Parameter | None = None
        if radial_scale is not None:
            # Its logarithm is learnt: a scale is positive.  DeepSpeed takes no 0-dimensional ones.
            self.log_radial_scale = nn.Parameter(torch.tensor([math.log(radial_scale)]))

    def forward(self, view: Tensor) -> Gaussian:
        return self.infer(self.backbone(view))

    def infer(self, h: Tensor) -> Gaussian:
        """Infer the posterior from an embedding ``(B, width)``: everything behind the backbone."""
        mu, logvar, *scale_logvar = self.posterior(h).chunk(3 if self.own_scales else 2, dim=-1)
        if self.predictor is not None:
            mu = self.predictor(mu)
        radial_scale = None
        if self.log_radial_scale is not None:
            radial_scale = self.log_radial_scale.exp().squeeze()
        return Gaussian(h, mu, logvar, scale_logvar[0] if scale_logvar else None, radial_scale)


class Scores(NamedTuple):
    """Output of a `PrototypeBranch` for crops."""

    h: Tensor
    """Embedding: the backbone's output ``(B, width)``."""
    scores: Tensor
    """Similarity to each prototype ``(B, K)``."""


class Prototypes(nn.Module):
    """Cosines of unit vectors ``(B, D)`` with ``K`` learnt directions, ``(B, K)``.

    Args:
        dim, count: ``D`` and ``K``.
        scaled: Whether each direction also learns a factor, which starts at 1.
    """

    def __init__(self, dim: int, count: int, scaled: bool = False) -> None:
        super().__init__()
        self.direction = nn.Linear(dim, count, bias=False)
        self.scale = nn.Parameter(torch.ones(count)) if scaled else None

    def forward(self, unit: Tensor, frozen: bool = False) -> Tensor:
        weight: Tensor = self.direction.weight
        scale: Tensor | None = self.scale
        if frozen:
            # A gradient of zero, not none: DeepSpeed then sees the same parameters at every step.
            # All that weight decay can still do to a row is undone by its normalisation.
            weight = weight.detach() + 0 * weight
            scale = None if scale is None else scale.detach() + 0 * scale
        scores = F.linear(unit, F.normalize(weight, dim=-1))
        return scores if scale is None else scores * scale


class PrototypeBranch(nn.Module):
    """backbone -> projector -> unit vector -> prototypes."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, prototypes: Prototypes) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.prototypes = prototypes

    def forward(self, crops: Tensor, frozen: bool = False) -> Scores:
        """Score crops; ``frozen`` spares the prototypes, and nothing else, the gradient."""
        h = self.backbone(crops)
        unit = F.normalize(self.projector(h), dim=-1)
        return Scores(h, self.prototypes(unit, frozen))
