"""BYOL: Bootstrap Your Own Latent (Grill et al., 2020), arXiv 2006.07733.

The student predicts the teacher's projection of the other view; the teacher is an exponential
moving average of the student.  No negatives: predictor and moving average keep it from collapsing.

Defaults are the paper's for ImageNet.  The two directions are added, not averaged: the paper's
learning rates belong to the sum.
"""

from __future__ import annotations

import copy
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


class BYOLConfig(MethodConfig):
    """BYOL's own keys; the teacher's decay is ``engine.ema_decay``."""

    name: Literal["byol"] = "byol"
    zero_init_residual: bool = True
    """Start every residual block as the identity, as the authors' code does."""
    hidden: Width = 4096
    """Hidden width of projector and predictor."""
    dim: Width = 256
    """Width of projection and prediction."""
    evaluated: Literal["student", "teacher"] = "student"
    """Network whose backbone is exported and judged; the paper keeps the student's."""

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher: BYOL always has one."""
        return True


class BYOL:
    """Student and teacher, and the loss on two views."""

    def __init__(self, cfg: BYOLConfig, image_size: int, any_size: bool = False) -> None:
        self.evaluated = cfg.evaluated
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        projector = mlp(width, cfg.hidden, cfg.dim)
        predictor = mlp(cfg.dim, cfg.hidden, cfg.dim)
        self.student: nn.Module = ProjectionBranch(backbone, projector, predictor)
        teacher = copy.deepcopy(ProjectionBranch(backbone, projector))
        self.teacher: nn.Module | None = teacher.requires_grad_(False)

    def loss(self, views: Sequence[Tensor], noise: Noise) -> LossOutput:
        """Squared distance of unit prediction and unit target, summed over both directions."""
        pair = two_views(views)
        assert self.teacher is not None
        with torch.no_grad():
            targets: list[Projection] = forward_views(self.teacher, pair)
            target_1, target_2 = targets
        outputs: list[Projection] = forward_views(self.student, pair)
        out_1, out_2 = outputs
        # Equation 2 in both directions, added and not halved, as the paper does.
        loss = squared_distance(out_1.p, target_2.z) + squared_distance(out_2.p, target_1.z)

        def metrics() -> dict[str, Tensor]:
            figures = {
                "projection_spread": monitors.spread(target_1.z),
                "alignment_cos": monitors.alignment_cos(out_1.p, target_2.z),
            }
            return figures | monitors.views(out_1.h, out_2.h, target_1.h)

        return LossOutput(loss, out_1.h.detach(), metrics)


def squared_distance(p: Tensor, z: Tensor) -> Tensor:
    """``|p/|p| - z/|z||^2 = 2 - 2 cos(p, z)`` averaged over the batch; ``(B, D)`` x 2 -> scalar.

    >>> a = torch.tensor([[1.0, 0.0]])
    >>> squared_distance(a, 3 * a).item(), squared_distance(a, -a).item()
    (0.0, 4.0)
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    return (2 - 2 * F.cosine_similarity(p.to(wide), z.to(wide), dim=-1)).mean()
