"""MoCo v3: Training Self-Supervised Vision Transformers (Chen et al., 2021), arXiv 2104.02057.

The student's prediction of one view must find the teacher's projection of the other view of the
same image among those of all images of the batch (InfoNCE).  The teacher is an exponential moving
average of the student; there is no queue.

The two directions are added, and each is multiplied by ``2 T``: the paper's learning rates belong
to that sum (algorithm 1).  Defaults are the paper's for ResNet-50, in the authors' code: a
projector of two layers, a predictor of two, 4,096 wide, into 256 dimensions, batch norm after
every layer but the predictor's last.  For a ViT they have ``projector_layers: 3``,
``normalise_prediction: true``, ``temperature: 0.2`` and ``freeze_patches: true``.  Their
temperature for ResNet-50 is the code's, 1.0.
"""

from __future__ import annotations

import copy
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
from vssl_dist.errors import ConfigError
from vssl_dist.methods import monitors
from vssl_dist.methods.base import LossOutput, Noise, two_views
from vssl_dist.methods.views import forward_views
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import Projection, ProjectionBranch, mlp


class MoCoV3Config(MethodConfig):
    """MoCo v3's own keys; the teacher's decay is ``engine.ema_decay``."""

    name: Literal["moco_v3"] = "moco_v3"
    zero_init_residual: bool = True
    """Start every residual block as the identity, as the authors' code does."""
    projector_layers: Annotated[int, Field(ge=1)] = 2
    """Number of linear layers of the projector."""
    hidden: Positive = 4096
    """Hidden width of projector and predictor."""
    dim: Positive = 256
    """Width of projection and prediction."""
    normalise_prediction: bool = False
    """End the predictor, too, with a batch norm."""
    temperature: Annotated[Finite, Field(gt=0)] = 1.0
    """Temperature that cosine similarities are divided by."""
    freeze_patches: bool = False
    """Keep a ViT's patch projection as it was initialised: the paper's cure for instability."""
    evaluated: Literal["student", "teacher"] = "student"
    """Network whose backbone is exported and judged."""

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher: MoCo v3 always has one."""
        return True


class MoCoV3:
    """Student and teacher, and the loss on two views."""

    def __init__(self, cfg: MoCoV3Config, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        self.evaluated = cfg.evaluated
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        if cfg.freeze_patches:
            _freeze_patches(backbone, cfg.backbone)
        hidden = [cfg.hidden] * (cfg.projector_layers - 1)
        projector = mlp(width, *hidden, cfg.dim, normalise_output=True)
        predictor = mlp(
            cfg.dim,
            cfg.hidden,
            cfg.dim,
            normalise_output=cfg.normalise_prediction,
            output_bias=False,
        )
        self.student: nn.Module = ProjectionBranch(backbone, projector, predictor)
        teacher = copy.deepcopy(ProjectionBranch(backbone, projector))
        self.teacher: nn.Module | None = teacher.requires_grad_(False)

    def loss(self, views: Sequence[Tensor], noise: Noise) -> LossOutput:
        """InfoNCE of both directions, summed, the keys being those of all ranks."""
        pair = two_views(views)
        assert self.teacher is not None
        with torch.no_grad():
            teacher_outputs: list[Projection] = forward_views(self.teacher, pair)
            key_1, key_2 = teacher_outputs
            keys = [F.normalize(z, dim=-1) for z in at_least_float32(key_1.z, key_2.z)]
            all_1, all_2 = (dist.all_gather(key) for key in keys)
        outputs: list[Projection] = forward_views(self.student, pair)
        out_1, out_2 = outputs
        q_1, q_2 = (F.normalize(p, dim=-1) for p in at_least_float32(out_1.p, out_2.p))
        # The keys of all ranks lie in rank order, so this rank's own come after those before it.
        positive_index = dist.rank() * len(q_1) + torch.arange(len(q_1), device=q_1.device)
        temperature = self.cfg.temperature
        forward = info_nce(q_1, all_2, positive_index, temperature)
        back = info_nce(q_2, all_1, positive_index, temperature)

        def metrics() -> dict[str, Tensor]:
            figures = {
                "projection_spread": monitors.spread(keys[0]),
                "alignment_cos": monitors.alignment_cos(q_1, keys[1]),
            }
            return figures | monitors.views(out_1.h, out_2.h, key_1.h)

        # Scaled by 2 T, as in algorithm 1: the paper's learning rates belong to that.
        return LossOutput(2 * temperature * (forward + back), out_1.h.detach(), metrics)


def info_nce(queries: Tensor, keys: Tensor, positive_index: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of picking each query's positive key, averaged over the queries: equation 1.

    Args:
        queries: ``(B, D)`` unit vectors.
        keys: ``(N, D)`` unit vectors.
        positive_index: ``(B,)`` the row in ``keys`` of the same image's other view.
        temperature: Divisor of the cosines.

    >>> z = torch.eye(2)
    >>> round(info_nce(z, z, torch.arange(2), temperature=1.0).item(), 4)  # log(1 + 1 / e)
    0.3133
    """
    return F.cross_entropy(queries @ keys.T / temperature, positive_index)


def _freeze_patches(backbone: nn.Module, name: str) -> None:
    patches = getattr(backbone, "patch_embed", None)
    if patches is None:
        raise ConfigError(
            f"method.freeze_patches: {name} has no patch projection; leave it out for a ConvNet"
        )
    patches.requires_grad_(False)
