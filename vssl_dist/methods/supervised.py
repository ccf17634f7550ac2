"""The supervised control: the same backbone, data order and evaluation, trained on the labels.

Not self-supervised: it is what the others are measured against.  Softmax cross-entropy of a
linear classifier on one view.

Defaults are those of Goyal et al., 2017 (arXiv 1706.02677) for ImageNet: 1,000 classes, no label
smoothing, residual blocks that start as the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vssl_dist.config import MethodConfig
from vssl_dist.config.fields import Finite
from vssl_dist.densities import at_least_float32
from vssl_dist.errors import ConfigError
from vssl_dist.methods.base import LossOutput, MicroStep
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import Projection, ProjectionBranch


class SupervisedConfig(MethodConfig):
    """The supervised control's own keys."""

    global_views: ClassVar[int] = 1

    name: Literal["supervised"] = "supervised"
    zero_init_residual: bool = True
    """Start every residual block as the identity."""
    classes: Annotated[int, Field(ge=2)] = 1000
    """Number of classes of the training set."""
    label_smoothing: Annotated[Finite, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is spread over all classes."""

    @property
    def classes_wanted(self) -> int:
        """Number of classes that the training set must have."""
        return self.classes


class Supervised:
    """The student, and the loss on one view and its labels."""

    evaluated: Literal["student", "teacher"] = "student"

    def __init__(self, cfg: SupervisedConfig, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        self.student: nn.Module = ProjectionBranch(backbone, nn.Linear(width, cfg.classes))
        self.teacher: nn.Module | None = None

    def loss(self, views: Sequence[Tensor], micro_step: MicroStep) -> LossOutput:
        """Softmax cross-entropy, averaged over the batch."""
        if len(views) != 1:
            raise ConfigError(
                f"data.views: the supervised control sees 1 view, not {len(views)}: list one recipe"
            )
        out: Projection = self.student(views[0])
        (logits,) = at_least_float32(out.z)
        loss = F.cross_entropy(logits, micro_step.labels, label_smoothing=self.cfg.label_smoothing)

        def metrics() -> dict[str, Tensor]:
            hits = (logits.argmax(-1) == micro_step.labels).to(logits.dtype)
            return {"accuracy": hits.mean()}

        return LossOutput(loss, out.h.detach(), metrics)
