"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al., 2021),
arXiv 2103.03230.

The cross-correlation of the two views' projections, feature by feature over the batch of all
ranks, should be the identity: views agree (ones on the diagonal) and features say different
things (zeros beside it).  Neither a teacher nor negatives.

Defaults are the paper's for ImageNet: a projector of three layers of 8,192 without bias, and
``lambd`` 0.0051, the one of the authors' code.  The gradient is that of the paper's formula on the
whole batch, however many ranks compute it.  The authors' code sums the matrix over its processes
without telling autograd, so its gradient is smaller by their number: ``scale_loss: 0.03125`` is
that of their 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

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


class BarlowTwinsConfig(MethodConfig):
    """Barlow Twins' own keys."""

    name: Literal["barlow_twins"] = "barlow_twins"
    zero_init_residual: bool = True
    """Start every residual block as the identity, as the authors' code does."""
    hidden: Positive = 8192
    """Width of the projector's two hidden layers."""
    dim: Positive = 8192
    """Width of the projection."""
    lambd: Annotated[Finite, Field(ge=0)] = 0.0051
    """Weight of the entries beside the diagonal of the cross-correlation: the paper's lambda."""
    scale_loss: Annotated[Finite, Field(gt=0)] = 1.0
    """Factor of the whole loss; 1 is the paper's formula."""


class BarlowTwins:
    """The student, and the loss on two views."""

    evaluated: Literal["student", "teacher"] = "student"

    def __init__(self, cfg: BarlowTwinsConfig, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        # The batch norm at the end standardises the features over the batch of all ranks.
        projector = mlp(width, cfg.hidden, cfg.hidden, cfg.dim, normalise_output=True)
        self.student: nn.Module = ProjectionBranch(backbone, projector)
        self.teacher: nn.Module | None = None

    def loss(self, views: Sequence[Tensor], noise: Noise) -> LossOutput:
        """Distance of the cross-correlation over all ranks from the identity; one for all ranks."""
        pair = two_views(views)
        outputs: list[Projection] = forward_views(self.student, pair)
        out_1, out_2 = outputs
        z_1, z_2 = at_least_float32(out_1.z, out_2.z)
        images = dist.world_size() * len(z_1)
        # Equation 2: the last batch norm has standardised the features, so that their products
        # are correlations.
        correlation = dist.all_reduce(z_1.T @ z_2 / images)
        on_diagonal, off_diagonal = redundancy(correlation)

        def metrics() -> dict[str, Tensor]:
            figures = {
                "on_diagonal": on_diagonal.detach(),
                "off_diagonal": off_diagonal.detach(),
                "projection_spread": monitors.spread(z_1),
                "alignment_cos": monitors.alignment_cos(z_1, z_2),
            }
            return figures | monitors.views(out_1.h, out_2.h)

        # Equation 1.
        loss = self.cfg.scale_loss * (on_diagonal + self.cfg.lambd * off_diagonal)
        return LossOutput(loss, out_1.h.detach(), metrics)


def redundancy(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of ``(D, D)`` from the identity: on the diagonal, and beside it.

    >>> import torch
    >>> redundancy(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    (tensor(1.), tensor(4.))
    """
    diagonal = correlation.diagonal()
    return (diagonal - 1).square().sum(), correlation.square().fill_diagonal_(0).sum()
