"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., 2021),
arXiv 2104.14294.

The student's distribution over prototypes, for every crop of an image, should be the teacher's for
another, global crop of it.  The teacher is an exponential moving average of the student; what it
says is centred over the batch (no prototype wins everywhere) and sharpened by a low temperature
(nor do all win alike): together they keep it from collapsing.

Defaults are those of the authors' code for ImageNet: 8 local crops beside 2 global ones, a
projector of three layers (2,048 wide, GELU) into 256 dimensions, 65,536 prototypes of fixed norm
that rest during the first epoch, student temperature 0.1, the centre's decay 0.9.  The teacher's
temperature rises from 0.04 to 0.07 over 30 epochs, as in the paper; the code's own default stays
at 0.04.  Crops of one size go through the network together, as in that code, so a batch norm sees
all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from vssl_dist import dist
from vssl_dist.config import MethodConfig
from vssl_dist.config.fields import Finite, Positive, as_tuple
from vssl_dist.densities import at_least_float32
from vssl_dist.errors import ConfigError
from vssl_dist.methods import monitors
from vssl_dist.methods.base import LossOutput, MicroStep
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import PrototypeBranch, Prototypes, Scores

Temperature = Annotated[Finite, Field(gt=0)]
Temperatures = Annotated[tuple[Temperature, Temperature], BeforeValidator(as_tuple)]
Epochs = Annotated[Finite, Field(ge=0)]
GLOBAL = 2
"""Views that the teacher sees: the first ones."""


class DINOConfig(MethodConfig):
    """DINO's own keys; the teacher's decay is ``engine.ema_decay``."""

    global_views: ClassVar[int] = GLOBAL
    local_views_key: ClassVar[str | None] = "local_crops"

    name: Literal["dino"] = "dino"
    backbone: str = "vit_small_patch16_224"
    """A torchvision ResNet, any timm model, or ``resnet10_c16``; the default is the paper's
    ViT-S/16."""
    local_crops: Annotated[int, Field(ge=0)] = 8
    """Number of small crops that follow the two global ones in ``data.views``."""
    hidden: Positive = 2048
    """Width of the projector's two hidden layers."""
    bottleneck: Positive = 256
    """Width of the projection that the prototypes are compared with."""
    prototypes: Positive = 65536
    """Number of prototypes, over which the distributions are."""
    fixed_norm: bool = True
    """Keep the norm of all prototypes equal; false is better for a small ViT, and less stable."""
    freeze_epochs: Epochs = 1.0
    """Epochs in which the prototypes stay as they were initialised."""
    student_temperature: Temperature = 0.1
    """Temperature of the student's distribution."""
    teacher_temperature: Temperatures = (0.04, 0.07)
    """Temperatures of the teacher's distribution at the start and from ``teacher_warmup_epochs``
    on, linear in between."""
    teacher_warmup_epochs: Epochs = 30.0
    """Epochs in which the teacher's temperature rises."""
    centre_decay: Annotated[Finite, Field(ge=0, le=1)] = 0.9
    """Decay, per step, of the running mean that the teacher's scores are centred by."""
    evaluated: Literal["student", "teacher"] = "teacher"
    """Network whose backbone is exported and judged; the paper keeps the teacher's."""

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher: DINO always has one."""
        return True


class DINO:
    """Student and teacher, and the loss on global and local crops."""

    def __init__(self, cfg: DINOConfig, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        self.evaluated = cfg.evaluated
        any_size = any_size or cfg.local_crops > 0
        backbone, width = build_backbone(cfg.backbone, image_size, any_size=any_size)
        projector = gelu_mlp(width, cfg.hidden, cfg.hidden, cfg.bottleneck)
        prototypes = Prototypes(cfg.bottleneck, cfg.prototypes, scaled=not cfg.fixed_norm)
        student = PrototypeBranch(backbone, projector, prototypes)
        self.teacher: nn.Module | None = copy.deepcopy(student).requires_grad_(False)
        # It is saved, and put back after a skipped step, with the student's other buffers.
        self.centre = Centre(cfg.prototypes)
        student.add_module("centre", self.centre)
        self.student: nn.Module = student

    def loss(self, views: Sequence[Tensor], micro_step: MicroStep) -> LossOutput:
        """Cross-entropy of each global crop's teacher and each other crop's student."""
        cfg = self.cfg
        self._check(views)
        assert self.teacher is not None
        with torch.no_grad():
            teacher_outputs = by_size(self.teacher, views[:GLOBAL])
            scores = at_least_float32(*(crop.scores for crop in teacher_outputs))
            temperature = teacher_temperature(cfg, micro_step.epoch)
            targets = [F.softmax((s - self.centre.value) / temperature, dim=-1) for s in scores]
        frozen = micro_step.epoch < cfg.freeze_epochs
        student_outputs = by_size(lambda crops: self.student(crops, frozen), views)
        student_logits = [crop.scores / cfg.student_temperature for crop in student_outputs]
        loss = cross_view_entropy(student_logits, targets)
        # After its use: these targets are centred by what earlier batches left.
        self.centre.move(torch.cat(scores), cfg.centre_decay)
        embedding = student_outputs[0].h

        def metrics() -> dict[str, Tensor]:
            figures = {
                "teacher_entropy": torch.special.entr(targets[0]).sum(-1).mean(),
                "teacher_temperature": loss.new_full((), temperature),
                "alignment_cos": monitors.alignment_cos(embedding, teacher_outputs[1].h),
            }
            return figures | monitors.views(embedding, student_outputs[1].h, teacher_outputs[0].h)

        return LossOutput(loss, embedding.detach(), metrics)

    def _check(self, views: Sequence[Tensor]) -> None:
        if len(views) != self.cfg.views_wanted:
            raise ConfigError(
                f"data.views: {len(views)} views, but method.local_crops={self.cfg.local_crops} "
                f"and {GLOBAL} global ones make {self.cfg.views_wanted}"
            )
        if wrong := self.cfg.wrong_sizes([view.shape[-1] for view in views]):
            raise ConfigError(f"data.views: {wrong}")


class Centre(nn.Module):
    """The moving average of the teacher's scores over the images of all ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", torch.zeros(width))

    @torch.no_grad()
    def move(self, scores: Tensor, decay: float) -> None:
        """Move the centre towards the mean of ``(N, K)``, once per micro-step: equation 4."""
        mean = dist.all_reduce(scores.mean(0)) / dist.world_size()
        self.value.lerp_(mean.to(self.value), 1 - decay)


def teacher_temperature(cfg: DINOConfig, epoch: float) -> float:
    """The teacher's temperature after ``epoch`` epochs.

    >>> [round(teacher_temperature(DINOConfig(), e), 3) for e in (0, 15, 30, 99)]
    [0.04, 0.055, 0.07, 0.07]
    """
    first, last = cfg.teacher_temperature
    if epoch >= cfg.teacher_warmup_epochs:
        return last
    return first + (last - first) * epoch / cfg.teacher_warmup_epochs


def cross_view_entropy(student_logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy over the batch and all pairs of different views.

    Args:
        student_logits: The student's logits ``(B, K)`` for every view.
        targets: The teacher's probabilities ``(B, K)`` for the first views.

    >>> logits, target = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(cross_view_entropy([logits, logits], [target, target]).item(), 4)  # log 2
    0.6931
    """
    logs = [F.log_softmax(logits, dim=-1) for logits in at_least_float32(*student_logits)]
    pairs = [
        -(target * log).sum(-1).mean()
        for teacher_view, target in enumerate(targets)
        for student_view, log in enumerate(logs)
        if student_view != teacher_view
    ]
    return torch.stack(pairs).mean()


def by_size(network: Callable[[Tensor], Scores], views: Sequence[Tensor]) -> list[Scores]:
    """``network`` on all views, neighbours of one size in one batch; one `Scores` per view."""
    outputs: list[Scores] = []
    for _, same in groupby(views, key=lambda view: view.shape):
        crops = list(same)
        batched = network(torch.cat(crops))
        per_crop = zip(*(field.chunk(len(crops)) for field in batched), strict=True)
        outputs += [Scores(*fields) for fields in per_crop]
    return outputs


def gelu_mlp(*sizes: int) -> nn.Sequential:
    """Linear-GELU layers and a bare last Linear, weights from a normal of 0.02, as in a ViT."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        linear = nn.Linear(n_in, n_out)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])
