"""SimSiam and BYOL: the two methods that everything else is compared with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.views import NoNoise, two_views
from vssl_dist.errors import ConfigError
from vssl_dist.methods import build_method
from vssl_dist.methods.byol import BYOL, BYOLConfig
from vssl_dist.methods.simsiam import SimSiam, SimSiamConfig
from vssl_dist.models.heads import Projection

BYOL_CFG = BYOLConfig(backbone="resnet18_c16", hidden=32, dim=16)
SIMSIAM_CFG = SimSiamConfig(backbone="resnet18_c16", hidden=32, dim=16)


class Fixed(nn.Module):
    """A network that answers with prepared projections, whatever the view shows."""

    def __init__(self, *answers: Projection) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, _: Tensor) -> Projection:
        return self.answers.pop(0)


def leaves(batch: int = 4, dim: int = 6) -> Projection:
    return Projection(*(torch.randn(batch, dim, requires_grad=True) for _ in range(3)))


def test_simsiam_is_minus_the_mean_cosine_of_both_directions() -> None:
    torch.manual_seed(0)
    method, one, two = SimSiam(SIMSIAM_CFG, 32), leaves(), leaves()
    method.student = Fixed(one, two)
    loss = method.loss(two_views(4), NoNoise()).loss
    cosines = F.cosine_similarity(one.p, two.z), F.cosine_similarity(two.p, one.z)
    torch.testing.assert_close(loss, -(cosines[0].mean() + cosines[1].mean()) / 2)
    loss.backward()
    assert [leaf.grad is None for leaf in (one.z, two.z, one.p, two.p)] == [
        True,
        True,
        False,
        False,
    ]


def test_byol_is_the_sum_of_squared_distances_of_unit_vectors() -> None:
    torch.manual_seed(0)
    method, answers = BYOL(BYOL_CFG, 32), [leaves() for _ in range(4)]
    one, two, target_1, target_2 = answers
    method.student, method.teacher = Fixed(one, two), Fixed(target_1, target_2)
    loss = method.loss(two_views(4), NoNoise()).loss

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(1)

    want = (distance(one.p, target_2.z) + distance(two.p, target_1.z)).mean()
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("cfg", [BYOL_CFG, SIMSIAM_CFG], ids=["byol", "simsiam"])
def test_every_weight_of_the_student_learns_and_views_may_be_swapped(
    cfg: BYOLConfig | SimSiamConfig,
) -> None:
    torch.manual_seed(0)
    method = build_method(cfg, 32)
    one, two = two_views(8)
    loss = method.loss((one, two), NoNoise()).loss
    torch.testing.assert_close(method.loss((two, one), NoNoise()).loss, loss)
    loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    if method.teacher is not None:
        assert all(p.grad is None for p in method.teacher.parameters())


def test_byols_teacher_is_a_frozen_copy_without_the_predictor() -> None:
    method = BYOL(BYOL_CFG, 32)
    assert method.teacher is not None
    student = dict(method.student.named_parameters())
    teacher = dict(method.teacher.named_parameters())
    assert all(torch.equal(value, student[name]) for name, value in teacher.items())
    assert all(value is not student[name] for name, value in teacher.items())
    assert {name.partition(".")[0] for name in set(student) - set(teacher)} == {"predictor"}


def test_defaults_have_the_papers_shapes() -> None:
    with torch.device("meta"):
        simsiam = SimSiam(SimSiamConfig(), 224).student
        byol = BYOL(BYOLConfig(), 224).student

    def widths(net: nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]

    assert widths(simsiam) == [(2048, 2048)] * 3 + [(2048, 512), (512, 2048)]
    assert widths(byol) == [(2048, 4096), (4096, 256), (256, 4096), (4096, 256)]


def test_another_number_of_views_is_refused_in_one_line() -> None:
    method = build_method(SIMSIAM_CFG, 32)
    view, _ = two_views(2)
    with pytest.raises(ConfigError, match=r"data\.views: this method compares 2 views, not 3"):
        method.loss((view, view, view), NoNoise())
