from __future__ import annotations

import math

import pytest
import torch

from tests.support.plain import photographs
from vssl_dist.methods import monitors
from vssl_dist.models.backbones import build_backbone


def test_spread_is_near_one_on_the_sphere_and_zero_at_a_point() -> None:
    torch.manual_seed(0)
    assert monitors.spread(torch.randn(4096, 64)).item() == pytest.approx(1, abs=0.02)
    assert monitors.spread(torch.randn(1, 64).expand(32, 64)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (300, 16)])
def test_effective_rank_is_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    h = torch.randn(shape) * torch.linspace(0.1, 2, shape[1])
    rows = torch.nn.functional.normalize(h, dim=1)[:256].double()
    values = torch.linalg.svdvals(rows)
    share = values / values.sum()
    want = math.exp(-(share * share.log()).sum())
    assert monitors.effective_rank(h).item() == pytest.approx(want, rel=1e-3)


def test_effective_rank_counts_the_directions_in_use() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 5)).Q
    assert monitors.effective_rank(basis.T).item() == pytest.approx(5, rel=1e-3)
    assert monitors.effective_rank(basis[:, :1].T.expand(200, 64)).item() == pytest.approx(
        1, abs=0.01
    )


def test_uniformity_is_the_log_of_the_mean_potential_of_all_pairs() -> None:
    torch.manual_seed(0)
    h = torch.randn(20, 6)
    unit = h / h.norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in range(20) for j in range(i)]
    potentials = [math.exp(-2 * (unit[i] - unit[j]).square().sum().item()) for i, j in pairs]
    want = math.log(sum(potentials) / len(pairs))
    assert monitors.uniformity(h).item() == pytest.approx(want, rel=1e-5)
    assert monitors.uniformity(h[:1].expand(9, 6)).item() == pytest.approx(0, abs=1e-6)


def test_views_are_compared_as_unit_vectors_and_a_teacher_by_its_cosine() -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 8, 5)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b, c)]
    found = monitors.views(a, b)
    want = (unit[0] - unit[1]).square().sum(1).mean()
    torch.testing.assert_close(found.pop("embedding_alignment"), want)
    assert not found
    agreement = monitors.views(a, b, c)["teacher_agreement"]
    torch.testing.assert_close(agreement, (unit[0] * unit[2]).sum(1).mean())
    assert monitors.views(a, 3 * a, a)["embedding_alignment"].item() == pytest.approx(0, abs=1e-6)


def test_a_step_that_is_not_finite_has_no_shape_and_raises_no_alarm() -> None:
    values = monitors.embedding(torch.full((32, 8), torch.nan))
    assert all(math.isnan(value) for value in values.values())
    alarm = monitors.CollapseAlarm()
    assert not any(alarm.update(values, 32, 8) for _ in range(4))


def looks(*looked: dict[str, float], rows: int = 64, width: int = 128) -> list[bool]:
    alarm = monitors.CollapseAlarm()
    heard = []
    for values in looked:
        alarm.update(values, rows, width)
        heard.append(alarm.on)
    return heard


def test_the_alarm_takes_two_looks_and_ends_with_the_collapse() -> None:
    gone = {"embedding_spread": 0.05, "effective_rank": 30.0}
    fine = {"embedding_spread": 0.6, "effective_rank": 12.0}
    assert looks(gone, fine, gone, gone, gone, fine) == [False, False, False, True, True, False]


def test_narrow_or_low_rank_alone_is_no_collapse_and_both_are() -> None:
    for spread, rank, is_collapse in (
        (0.32, 4.0, False),
        (0.25, 20.0, False),
        (0.25, 4.0, True),
        (0.05, 60.0, True),
    ):
        values = {"embedding_spread": spread, "effective_rank": rank}
        assert looks(values, values)[-1] == is_collapse, values
    assert not looks({"embedding_spread": 0.0, "effective_rank": 1.0}, rows=15)[-1]
    projected = {"embedding_spread": 0.6, "effective_rank": 40.0, "projection_spread": 0.1}
    assert looks(projected, projected)[-1]
    alarm = monitors.CollapseAlarm()
    assert not any(alarm.update(projected, 64, 128, rows_per_rank=1) for _ in range(3))


def test_an_untrained_network_is_not_collapsed() -> None:
    images = photographs(32, 64)
    for name in ("resnet10_c16", "resnet18_c16", "vit_tiny_patch16_224"):
        torch.manual_seed(0)
        network, width = build_backbone(name, 32)
        with torch.no_grad():
            values = monitors.embedding(network(images))
        assert not looks(values, values, width=width)[-1], (name, values)


def test_monitors_take_what_autocast_gives() -> None:
    h = torch.randn(16, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        values = monitors.embedding(h.bfloat16())
    assert all(math.isfinite(v) for v in values.values())
    assert monitors.alignment_cos(h, 2 * h).item() == pytest.approx(1)
    sigma = monitors.scale(torch.tensor([[0.25, 1.0, 4.0]]).log())
    assert [round(v.item(), 4) for v in sigma.values()] == [1.1667, 0.5, 2.0]
