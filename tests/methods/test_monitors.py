from __future__ import annotations

import math

import pytest
import torch

from vssl_dist.methods import monitors


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


def test_monitors_take_what_autocast_gives() -> None:
    h = torch.randn(16, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        values = monitors.embedding(h.bfloat16())
    assert all(math.isfinite(v) for v in values.values())
    assert monitors.alignment(h, 2 * h).item() == pytest.approx(1)
    sigma = monitors.scale(torch.tensor([[0.25, 1.0, 4.0]]).log())
    assert [round(v.item(), 4) for v in sigma.values()] == [1.1667, 0.5, 2.0]
