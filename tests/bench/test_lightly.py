"""The methods against lightly's losses, where the optional extra ``compare`` is installed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from bench.references import (
    DINO_CENTRE,
    NUM_IMAGES,
    NUM_PROTOTYPES,
    LossCase,
    loss_cases,
    unit_vector,
)
from vssl_dist.vision import torchvision

CASES = {case.name: case for case in loss_cases()}


@pytest.fixture(scope="module")
def losses() -> ModuleType:
    torchvision()  # lightly imports it, and must find it open
    return pytest.importorskip("lightly.loss", reason="pip install .[compare]")


def agrees(case: LossCase, theirs: object) -> None:
    assert callable(theirs)
    loss, gradient = LossCase(case.name, case.shapes, case.ours, theirs).errors()
    assert max(loss, gradient) < 1e-6


def test_byol_is_four_plus_twice_both_negative_cosines(losses: ModuleType) -> None:
    cosine = losses.NegativeCosineSimilarity()
    agrees(
        CASES["byol"],
        lambda x: 4 + 2 * (cosine(x[0], x[3].detach()) + cosine(x[2], x[1].detach())),
    )


def test_simsiam(losses: ModuleType) -> None:
    cosine = losses.NegativeCosineSimilarity()
    agrees(
        CASES["simsiam"],
        lambda x: 0.5 * (cosine(x[0], x[3].detach()) + cosine(x[2], x[1].detach())),
    )


def test_nt_xent(losses: ModuleType) -> None:
    agrees(CASES["simclr"], lambda x: losses.NTXentLoss(temperature=0.1)(*x))


def test_vicreg(losses: ModuleType) -> None:
    agrees(CASES["vicreg"], lambda x: losses.VICRegLoss()(*x))


def test_barlow_twins(losses: ModuleType) -> None:
    agrees(CASES["barlow_twins"], lambda x: losses.BarlowTwinsLoss(lambda_param=0.0051)(*x))


def test_dino(losses: ModuleType) -> None:
    def theirs(leaves: list[Tensor]) -> Tensor:
        *crops, weight = leaves
        rows = torch.stack([unit_vector(row) for row in weight])
        said = [torch.stack([unit_vector(x) for x in crop]) @ rows.T for crop in crops]
        loss = losses.DINOLoss(NUM_PROTOTYPES).double()
        loss.center.copy_(DINO_CENTRE)
        told = [-scores.detach() for scores in said[:2]]
        value: Tensor = loss(told, said, teacher_temp=0.055)
        return value

    assert CASES["dino"].shapes[0][0] == NUM_IMAGES
    agrees(CASES["dino"], theirs)
