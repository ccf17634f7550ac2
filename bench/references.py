"""Every method's loss a second time: naive, one pair at a time, in float64.

Nothing here uses anything of the methods.  A case feeds both the same leaves, through the
method's own ``loss`` with networks that answer with those leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vssl_dist.methods import GlobalNoise, MicroStep, build_method
from vssl_dist.methods.barlow_twins import BarlowTwinsConfig
from vssl_dist.methods.base import Method
from vssl_dist.methods.byol import BYOLConfig
from vssl_dist.methods.dino import DINO, DINOConfig
from vssl_dist.methods.moco_v3 import MoCoV3Config
from vssl_dist.methods.simclr import SimCLRConfig
from vssl_dist.methods.simsiam import SimSiamConfig
from vssl_dist.methods.vicreg import VICRegConfig
from vssl_dist.models.heads import Projection, ProjectionBranch, PrototypeBranch, Prototypes
from vssl_dist.models.norm import synchronise

NUM_IMAGES, FEATURE_WIDTH, NUM_PROTOTYPES = 6, 5, 7
CURRENT_EPOCH = 12.0
SMALL_NETWORK: dict[str, Any] = {"backbone": "resnet10_c16"}
MICRO_STEP = MicroStep(
    GlobalNoise(0, 0, 0), CURRENT_EPOCH, torch.zeros(NUM_IMAGES, dtype=torch.int64)
)
Leaves = Sequence[Tensor]


@dataclass(frozen=True)
class LossCase:
    """One method's loss, and its naive counterpart."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    ours: Callable[[Leaves], Tensor]
    naive: Callable[[Leaves], Tensor]

    def errors(self, seed: int = 0) -> tuple[float, float]:
        """Relative error of the loss, and the gradient's largest one relative to its largest."""
        generator = torch.Generator().manual_seed(seed)
        leaf_values = [
            torch.randn(s, generator=generator, dtype=torch.float64) for s in self.shapes
        ]
        (loss, gradient), (exact_loss, exact_gradient) = (
            _evaluate(f, leaf_values) for f in (self.ours, self.naive)
        )
        gradient_error = (gradient - exact_gradient).abs().max() / exact_gradient.abs().max()
        return abs(loss - exact_loss) / abs(exact_loss), gradient_error.item()


def _evaluate(
    loss_function: Callable[[Leaves], Tensor], leaf_values: Leaves
) -> tuple[float, Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaf_values]
    loss = loss_function(leaves)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return loss.item(), torch.cat([g.flatten() for g in gradients])


class PreparedNetwork(nn.Module):
    """A network that gives prepared projections in turn, whatever the view."""

    def __init__(self, *projections: Projection) -> None:
        super().__init__()
        self.projections = list(projections)

    def forward(self, _: Tensor) -> Projection:
        return self.projections.pop(0)


def _method_loss(method: Method, student: nn.Module, teacher: nn.Module | None = None) -> Tensor:
    method.student, method.teacher = student, teacher
    return method.loss([torch.zeros(NUM_IMAGES, 3, 32, 32)] * 2, MICRO_STEP).loss


def unit_vector(x: Tensor) -> Tensor:
    """A vector of length 1 along ``(D,)``."""
    return x / (x * x).sum().sqrt()


def _loss_with_predictions(method: Method, leaves: Leaves) -> Tensor:
    """Leaves are p_1, z_1, p_2, z_2; where there is a teacher the z are its."""
    p_1, z_1, p_2, z_2 = leaves
    student = PreparedNetwork(Projection(p_1, z_1, p_1), Projection(p_2, z_2, p_2))
    # What a frozen network answers has no history.
    teacher = PreparedNetwork(*(Projection(z, z, z) for z in (z_1.detach(), z_2.detach())))
    return _method_loss(method, student, teacher if method.teacher is not None else None)


def _loss_of_two_views(method: Method, leaves: Leaves) -> Tensor:
    one, two = leaves
    return _method_loss(
        method, PreparedNetwork(Projection(one, one, one), Projection(two, two, two))
    )


def naive_byol(leaves: Leaves) -> Tensor:
    """Both directions' squared distances of unit vectors, added; the mean over the images."""
    p_1, z_1, p_2, z_2 = leaves
    total = torch.zeros((), dtype=torch.float64)
    for i in range(NUM_IMAGES):
        for p, z in ((p_1[i], z_2[i].detach()), (p_2[i], z_1[i].detach())):
            total = total + ((unit_vector(p) - unit_vector(z)) ** 2).sum()
    return total / NUM_IMAGES


def naive_simsiam(leaves: Leaves) -> Tensor:
    """Half of both directions' negative cosines; the mean over the images."""
    p_1, z_1, p_2, z_2 = leaves
    total = torch.zeros((), dtype=torch.float64)
    for i in range(NUM_IMAGES):
        for p, z in ((p_1[i], z_2[i].detach()), (p_2[i], z_1[i].detach())):
            total = total - unit_vector(p) @ unit_vector(z) / 2
    return total / NUM_IMAGES


def naive_nt_xent(leaves: Leaves, temperature: float) -> Tensor:
    """Formula 1 of SimCLR for each of the 2 N views."""
    rows = [unit_vector(row) for view in leaves for row in view]
    total = torch.zeros((), dtype=torch.float64)
    for i, anchor in enumerate(rows):
        exp_similarities = [torch.exp(anchor @ row / temperature) for row in rows]
        denominator = sum(value for k, value in enumerate(exp_similarities) if k != i)
        total = total - torch.log(
            exp_similarities[(i + NUM_IMAGES) % (2 * NUM_IMAGES)] / denominator
        )
    return total / (2 * NUM_IMAGES)


def naive_moco_v3(leaves: Leaves, temperature: float) -> Tensor:
    """Algorithm 1: the sum of both contrastive losses, each times 2 T."""
    p_1, z_1, p_2, z_2 = leaves
    total = torch.zeros((), dtype=torch.float64)
    for p, z in ((p_1, z_2.detach()), (p_2, z_1.detach())):
        for i in range(NUM_IMAGES):
            exp_similarities = [
                torch.exp(unit_vector(p[i]) @ unit_vector(key) / temperature) for key in z
            ]
            log_share = torch.log(exp_similarities[i] / sum(exp_similarities))
            total = total - 2 * temperature * log_share / NUM_IMAGES
    return total


def naive_barlow_twins(leaves: Leaves, lambd: float) -> Tensor:
    """Formula 1 of the paper; features are standardised as a batch norm does (biased, 1e-5)."""
    columns = []
    for view in leaves:
        mean = sum(view) / NUM_IMAGES
        variance = sum((row - mean) ** 2 for row in view) / NUM_IMAGES
        columns.append((view - mean) / torch.sqrt(variance + 1e-5))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(FEATURE_WIDTH):
        for j in range(FEATURE_WIDTH):
            c = sum(columns[0][b, i] * columns[1][b, j] for b in range(NUM_IMAGES)) / NUM_IMAGES
            total = total + ((c - 1) ** 2 if i == j else lambd * c**2)
    return total


def naive_vicreg(leaves: Leaves) -> Tensor:
    """25 s + 25 v + c, with the authors' halves: v the mean of both views, c their sum."""
    one, two = leaves
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(one, two, strict=True):
        total = total + 25 * ((a - b) ** 2).sum() / (NUM_IMAGES * FEATURE_WIDTH)
    for view in leaves:
        centred = view - sum(view) / NUM_IMAGES
        for i in range(FEATURE_WIDTH):
            for j in range(FEATURE_WIDTH):
                c = (centred[:, i] * centred[:, j]).sum() / (NUM_IMAGES - 1)
                if i == j:
                    std_shortfall = torch.clamp(1 - torch.sqrt(c + 1e-4), min=0)
                    total = total + 25 * std_shortfall / FEATURE_WIDTH / 2
                else:
                    total = total + c**2 / FEATURE_WIDTH
    return total


DINO_CFG = DINOConfig(
    local_crops=2, prototypes=NUM_PROTOTYPES, teacher_warmup_epochs=24.0, **SMALL_NETWORK
)
DINO_CENTRE = torch.linspace(-0.5, 0.5, NUM_PROTOTYPES, dtype=torch.float64)


def our_dino(leaves: Leaves) -> Tensor:
    """Leaves are four crops' features and the prototypes; the teacher has their negatives."""
    *crops, weight = leaves
    method = DINO(DINO_CFG, 32)
    networks = [_prototype_branch(w) for w in (weight, -weight.detach())]
    method.student, method.teacher = networks
    method.centre.value = DINO_CENTRE.clone()
    return method.loss(crops, MICRO_STEP).loss


def _prototype_branch(weight: Tensor) -> nn.Module:
    prototypes = Prototypes(FEATURE_WIDTH, NUM_PROTOTYPES)
    del prototypes.direction.weight
    prototypes.direction.weight = weight  # a leaf of ours in a parameter's place
    return PrototypeBranch(nn.Identity(), nn.Identity(), prototypes)


def naive_dino(leaves: Leaves) -> Tensor:
    """Formula 3 of the paper, one image and pair of crops at a time."""
    *crops, weight = leaves
    total, num_pairs = torch.zeros((), dtype=torch.float64), 0
    for t in range(2):
        for s in range(len(crops)):
            if s == t:
                continue
            num_pairs += 1
            for i in range(NUM_IMAGES):
                teacher_scores = torch.stack(
                    [-unit_vector(w) @ unit_vector(crops[t][i]) for w in weight]
                ).detach()
                # The teacher's temperature is halfway from 0.04 to 0.07.
                teacher_exp = torch.exp((teacher_scores - DINO_CENTRE) / 0.055)
                student_scores = torch.stack(
                    [unit_vector(w) @ unit_vector(crops[s][i]) for w in weight]
                )
                student_exp = torch.exp(student_scores / 0.1)
                student_log = torch.log(student_exp / student_exp.sum())
                cross_entropy = -(teacher_exp / teacher_exp.sum() * student_log).sum()
                total = total + cross_entropy / NUM_IMAGES
    return total / num_pairs


def our_barlow_twins(leaves: Leaves) -> Tensor:
    """The method's own batch norm standardises the leaves."""
    norm = synchronise(nn.BatchNorm1d(FEATURE_WIDTH, affine=False).double())
    method = build_method(BarlowTwinsConfig(hidden=8, dim=FEATURE_WIDTH, **SMALL_NETWORK), 32)
    method.student = ProjectionBranch(nn.Identity(), norm)
    return method.loss(leaves, MICRO_STEP).loss


def loss_cases() -> list[LossCase]:
    """All methods that have a closed form."""
    one = (NUM_IMAGES, FEATURE_WIDTH)
    byol = build_method(BYOLConfig(hidden=8, dim=FEATURE_WIDTH, **SMALL_NETWORK), 32)
    simsiam = build_method(SimSiamConfig(hidden=8, dim=FEATURE_WIDTH, **SMALL_NETWORK), 32)
    moco = build_method(
        MoCoV3Config(hidden=8, dim=FEATURE_WIDTH, temperature=0.2, **SMALL_NETWORK), 32
    )
    simclr = build_method(SimCLRConfig(dim=FEATURE_WIDTH, **SMALL_NETWORK), 32)
    vicreg = build_method(VICRegConfig(hidden=8, dim=FEATURE_WIDTH, **SMALL_NETWORK), 32)
    dino = (one,) * 4 + ((NUM_PROTOTYPES, FEATURE_WIDTH),)
    return [
        LossCase("byol", (one,) * 4, lambda x: _loss_with_predictions(byol, x), naive_byol),
        LossCase(
            "simsiam", (one,) * 4, lambda x: _loss_with_predictions(simsiam, x), naive_simsiam
        ),
        LossCase(
            "moco_v3",
            (one,) * 4,
            lambda x: _loss_with_predictions(moco, x),
            lambda x: naive_moco_v3(x, 0.2),
        ),
        LossCase(
            "simclr",
            (one,) * 2,
            lambda x: _loss_of_two_views(simclr, x),
            lambda x: naive_nt_xent(x, 0.1),
        ),
        LossCase("vicreg", (one,) * 2, lambda x: _loss_of_two_views(vicreg, x), naive_vicreg),
        LossCase(
            "barlow_twins", (one,) * 2, our_barlow_twins, lambda x: naive_barlow_twins(x, 0.0051)
        ),
        LossCase("dino", dino, our_dino, naive_dino),
    ]
