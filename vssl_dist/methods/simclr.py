"""SimCLR: A Simple Framework for Contrastive Learning (Chen et al., 2020), arXiv 2002.05709.

Each view must find the other view of its image among the views of all images of the batch, whose
similarities share one softmax (NT-Xent).  No teacher: the negatives keep it from collapsing, so
the batch, which is that of all ranks, is large.

Defaults are the paper's for ImageNet (section 2 and appendix B): a projector of two layers, the
hidden one as wide as the backbone's output, 128 dimensions, temperature 0.1.  As in the authors'
code the output is batch-normalised, here without a learnt scale.
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


class SimCLRConfig(MethodConfig):
    """SimCLR's own keys."""

    name: Literal["simclr"] = "simclr"
    zero_init_residual: bool = True
    """Start every residual block as the identity, as the authors' code does."""
    hidden: Positive | None = None
    """Width of the projector's hidden layer; null: the backbone's width."""
    dim: Positive = 128
    """Width of the projection."""
    temperature: Annotated[Finite, Field(gt=0)] = 0.1
    """Temperature that cosine similarities are divided by."""


class SimCLR:
    """The student, and the loss on two views."""

    evaluated: Literal["student", "teacher"] = "student"

    def __init__(self, cfg: SimCLRConfig, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        projector = mlp(width, cfg.hidden or width, cfg.dim, normalise_output=True)
        self.student: nn.Module = ProjectionBranch(backbone, projector)
        self.teacher: nn.Module | None = None

    def loss(self, views: Sequence[Tensor], noise: Noise) -> LossOutput:
        """NT-Xent of this rank's views among those of all ranks."""
        pair = two_views(views)
        outputs: list[Projection] = forward_views(self.student, pair)
        out_1, out_2 = outputs
        z_1, z_2 = (F.normalize(z, dim=-1) for z in at_least_float32(out_1.z, out_2.z))
        all_1, all_2 = dist.all_gather(z_1), dist.all_gather(z_2)
        # The views of all ranks lie in rank order, so this rank's own come after those before it.
        positive_index = dist.rank() * len(z_1) + torch.arange(len(z_1), device=z_1.device)
        forward = nt_xent(z_1, all_2, all_1, positive_index, self.cfg.temperature)
        back = nt_xent(z_2, all_1, all_2, positive_index, self.cfg.temperature)

        def metrics() -> dict[str, Tensor]:
            figures = {
                "projection_spread": monitors.spread(z_1),
                "alignment_cos": monitors.alignment_cos(z_1, z_2),
            }
            return figures | monitors.views(out_1.h, out_2.h)

        return LossOutput(0.5 * (forward + back), out_1.h.detach(), metrics)


def nt_xent(
    anchors: Tensor,
    other_view: Tensor,
    same_view: Tensor,
    positive_index: Tensor,
    temperature: float,
) -> Tensor:
    """Cross-entropy of picking the anchor's other view among all views but the anchor itself.

    Equation 1 of the paper, for one of the two views.

    Args:
        anchors: ``(B, D)`` unit vectors of one view.
        other_view: ``(N, D)`` unit vectors of the other view of all images.
        same_view: ``(N, D)`` unit vectors of the anchors' view of all images.
        positive_index: ``(B,)`` the row of each anchor's image in ``other_view`` and ``same_view``.
        temperature: Divisor of the cosines.

    Returns:
        Scalar: the mean over the anchors.

    >>> z = torch.eye(2)
    >>> round(nt_xent(z, z, z, torch.arange(2), temperature=1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    """
    # An anchor is not compared with itself: minus infinity leaves the softmax.
    negatives = (anchors @ same_view.T).scatter(1, positive_index[:, None], -torch.inf)
    cosines = torch.cat([anchors @ other_view.T, negatives], dim=1)
    return F.cross_entropy(cosines / temperature, positive_index)
