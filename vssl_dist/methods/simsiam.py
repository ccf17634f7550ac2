"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He, 2020), arXiv 2011.10566.

One network sees both views and predicts its own projection of the other one, which is held fixed
by a stop-gradient.  Neither a teacher nor negatives: the stop-gradient and the predictor keep it
from collapsing.

Defaults are the paper's for ImageNet, with one learning-rate schedule for all parameters (the
authors' code can keep the predictor's constant).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vssl_dist.config import MethodConfig
from vssl_dist.methods import monitors
from vssl_dist.methods.base import LossOutput, Noise, two_views
from vssl_dist.methods.views import forward_views
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import Projection, ProjectionBranch, mlp

Width = Annotated[int, Field(gt=0)]


class SimSiamConfig(MethodConfig):
    """SimSiam's own keys."""

    name: Literal["simsiam"] = "simsiam"
    zero_init_residual: bool = True
    """Start every residual block as the identity, as the authors' code does."""
    projector_layers: Annotated[int, Field(ge=1)] = 3
    """Number of linear layers of the projector."""
    hidden: Width | None = None
    """Width of the projector's hidden layers; null: the backbone's width."""
    dim: Width = 2048
    """Width of the projection."""
    bottleneck: Width | None = None
    """Hidden width of the predictor; null: a quarter of ``dim``."""


class SimSiam:
    """The student, and the loss on two views."""

    evaluated: Literal["student", "teacher"] = "student"

    def __init__(self, cfg: SimSiamConfig, image_size: int, any_size: bool = False) -> None:
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        hidden = [cfg.hidden or width] * (cfg.projector_layers - 1)
        projector = mlp(width, *hidden, cfg.dim, normalise_output=True)
        predictor = mlp(cfg.dim, cfg.bottleneck or max(cfg.dim // 4, 1), cfg.dim)
        self.student: nn.Module = ProjectionBranch(backbone, projector, predictor)
        self.teacher: nn.Module | None = None

    def loss(self, views: Sequence[Tensor], noise: Noise) -> LossOutput:
        """Negative mean cosine of each prediction and the other view's fixed projection."""
        pair = two_views(views)
        outputs: list[Projection] = forward_views(self.student, pair)
        out_1, out_2 = outputs
        # The paper's symmetric loss; the stop-gradient is inside `negative_cosine`.
        loss = 0.5 * (negative_cosine(out_1.p, out_2.z) + negative_cosine(out_2.p, out_1.z))

        def metrics() -> dict[str, Tensor]:
            figures = {
                "projection_spread": monitors.spread(out_1.z),
                "alignment_cos": monitors.alignment_cos(out_1.z, out_2.z),
            }
            return figures | monitors.views(out_1.h, out_2.h)

        return LossOutput(loss, out_1.h.detach(), metrics)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """``-cos(p, sg(z))`` averaged over the batch; ``(B, D)``, ``(B, D)`` -> scalar.

    >>> a = torch.tensor([[1.0, 0.0]])
    >>> negative_cosine(a, 3 * a).item(), negative_cosine(a, -a).item()
    (-1.0, 1.0)
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    return -F.cosine_similarity(p.to(wide), z.detach().to(wide), dim=-1).mean()
