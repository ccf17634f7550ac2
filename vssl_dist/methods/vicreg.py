"""VICReg: Variance-Invariance-Covariance Regularization (Bardes et al., 2021), arXiv 2105.04906.

Three terms on the two views' projections: they are close (invariance), every feature keeps a
standard deviation of at least 1 over the batch (variance), and features are not correlated
(covariance).  Neither a teacher nor negatives, and no normalisation of the projections.

Defaults are the paper's for ImageNet: a projector of three layers of 8,192, weights 25, 25 and 1.
As in the authors' code, the variance term is the mean of both views', the covariance term their
sum, and variance and covariance are those of the batch of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vssl_dist import dist
from vssl_dist.config import MethodConfig
from vssl_dist.config.fields import Finite, Positive
from vssl_dist.densities import at_least_float32
from vssl_dist.methods import monitors
from vssl_dist.methods.base import LossOutput, Noise, two_views
from vssl_dist.methods.views import forward_views
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import Projection, ProjectionBranch, mlp

Weight = Annotated[Finite, Field(ge=0)]


class VICRegConfig(MethodConfig):
    """VICReg's own keys."""

    name: Literal["vicreg"] = "vicreg"
    zero_init_residual: bool = True
    """Start every residual block as the identity, as the authors' code does."""
    hidden: Positive = 8192
    """Width of the projector's two hidden layers."""
    dim: Positive = 8192
    """Width of the projection."""
    invariance_weight: Weight = 25.0
    """Weight of the mean squared distance of the two views' projections."""
    variance_weight: Weight = 25.0
    """Weight of what each feature's standard deviation lacks to 1."""
    covariance_weight: Weight = 1.0
    """Weight of the squared covariances of different features."""


class VICReg:
    """The student, and the loss on two views."""

    evaluated: Literal["student", "teacher"] = "student"

    def __init__(self, cfg: VICRegConfig, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        # No bias at the end: none of the three terms could tell.
        projector = mlp(width, cfg.hidden, cfg.hidden, cfg.dim, output_bias=False)
        self.student: nn.Module = ProjectionBranch(backbone, projector)
        self.teacher: nn.Module | None = None

    def loss(self, views: Sequence[Tensor], noise: Noise) -> LossOutput:
        """The weighted sum of the three terms."""
        cfg = self.cfg
        pair = two_views(views)
        outputs: list[Projection] = forward_views(self.student, pair)
        out_1, out_2 = outputs
        z_1, z_2 = at_least_float32(out_1.z, out_2.z)
        all_1, all_2 = dist.all_gather(z_1), dist.all_gather(z_2)
        invariance = F.mse_loss(z_1, z_2)
        variance = 0.5 * (variance_hinge(all_1) + variance_hinge(all_2))
        covariance = squared_covariance(all_1) + squared_covariance(all_2)
        # Equation 6.
        loss = (
            cfg.invariance_weight * invariance
            + cfg.variance_weight * variance
            + cfg.covariance_weight * covariance
        )

        def metrics() -> dict[str, Tensor]:
            figures = {
                "invariance": invariance.detach(),
                "variance": variance.detach(),
                "covariance": covariance.detach(),
                "projection_spread": monitors.spread(z_1),
                "alignment_cos": monitors.alignment_cos(z_1, z_2),
            }
            return figures | monitors.views(out_1.h, out_2.h)

        return LossOutput(loss, out_1.h.detach(), metrics)


def variance_hinge(z: Tensor) -> Tensor:
    """Mean shortfall of the features' standard deviations from 1; ``(N, D)`` -> scalar.

    >>> round(variance_hinge(torch.tensor([[1.0, 9.0], [1.0, 0.0]])).item(), 4)  # 0.99 / 2
    0.495
    """
    # The 1e-4 keeps the square root's gradient finite where a feature does not vary.
    return F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()


def squared_covariance(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different features, over ``D``; ``(N, D)`` -> scalar.

    >>> squared_covariance(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])).item()  # 2 * 4^2 / 2
    16.0
    """
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    return covariance.square().fill_diagonal_(0).sum() / z.shape[1]
