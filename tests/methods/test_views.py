"""All views in one batch are views in batches of their own, for every method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vssl_dist.methods import CONFIGS, GlobalNoise, MicroStep, build_method, views
from vssl_dist.methods.base import Method
from vssl_dist.models.heads import Gaussian

CONFIG_FILES = Path(__file__).parents[2] / "configs"
METHOD_NAMES = sorted(set(CONFIGS) - {"supervised"})
IMAGES, SIDE = 6, 32


class Noise64(GlobalNoise):
    """Draws in float64."""

    def normal(self, branch: str, shape: Any) -> Tensor:
        return super().normal(branch, shape).double()


def _method(name: str, backbone: str, dtype: torch.dtype) -> Method:
    small = {"hidden": 16} if "hidden" in CONFIGS[name].model_fields else {}
    small |= {"prototypes": 12, "bottleneck": 8, "local_crops": 2} if name == "dino" else {}
    small |= {"target": "ema", "learn_radial_scale": True} if name == "vje" else {}
    torch.manual_seed(0)
    method = build_method(CONFIGS[name](backbone=backbone, **small), SIDE, [SIDE, SIDE, 16, 16])
    method.student.train().to(dtype)
    if method.teacher is not None:
        method.teacher.train().to(dtype)
    return method


def _step(method: Method, dtype: torch.dtype, *, together: bool) -> dict[str, Tensor]:
    """Loss, metrics, buffers and weights after one step of gradient descent from one start.

    The step moves the weight that moves farthest by 0.1.
    """
    method = copy.deepcopy(method)
    count = 4 if hasattr(method, "centre") else 2
    generator = torch.Generator().manual_seed(1)
    crops = [
        torch.randn(IMAGES, 3, SIDE if n < 2 else 16, SIDE if n < 2 else 16, generator=generator)
        for n in range(count)
    ]
    noise = (Noise64 if dtype == torch.float64 else GlobalNoise)(0, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "share_a_batch", lambda _: together)
        micro_step = MicroStep(noise, 1.5, torch.zeros(IMAGES, dtype=torch.int64))
        out = method.loss([crop.to(dtype) for crop in crops], micro_step)
    out.loss.backward()
    values = {"loss": out.loss.detach(), "embedding": out.embedding} | out.metrics
    for network in filter(None, (method.student, method.teacher)):
        values |= {f"{id(network)}.{n}": b for n, b in network.named_buffers()}
    trained = [p for p in method.student.parameters() if p.grad is not None]
    gradients = [p.grad for p in trained if p.grad is not None]
    rate = 0.1 / max(gradient.abs().max().item() for gradient in gradients)
    weights = [p.detach() - rate * g for p, g in zip(trained, gradients, strict=True)]
    return {str(n): value for n, value in enumerate([*values.values(), *weights])}


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_one_batch_of_all_views_is_a_batch_per_view(name: str) -> None:
    method = _method(name, "resnet10_c16", torch.float64)
    _assert_views_may_share_a_batch(method, torch.float64, 1e-12)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_vit_takes_all_views_at_once(name: str) -> None:
    method = _method(name, "vit_tiny_patch16_224", torch.float64)
    _assert_views_may_share_a_batch(method, torch.float64, 1e-12)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_in_float32_they_agree_where_activations_are_smooth(name: str) -> None:
    method = _method(name, "resnet10_c16", torch.float32)
    for network in filter(None, (method.student, method.teacher)):
        for module in list(network.modules()):
            for child, layer in module.named_children():
                if isinstance(layer, nn.ReLU):
                    setattr(module, child, nn.Softplus())
    _assert_views_may_share_a_batch(method, torch.float32, 1e-6)


def _assert_views_may_share_a_batch(method: Method, dtype: torch.dtype, bound: float) -> None:
    one, two = (_step(method, dtype, together=together) for together in (True, False))
    assert set(one) == set(two)
    for name, value in one.items():
        largest = two[name].abs().max().clamp(min=1.0)
        assert (value - two[name]).abs().max() <= bound * largest, name


def test_what_has_no_rows_is_shared_and_what_is_none_stays() -> None:
    rows = torch.arange(8.0).view(4, 2)
    both = Gaussian(rows, rows + 1, rows + 2, None, torch.tensor(3.0))
    one, two = views.split_views(both, 2)
    assert (type(one), one.scale_logvar, one.radial_scale) == (Gaussian, None, both.radial_scale)
    assert one.h.tolist() == [[0, 1], [2, 3]]
    assert two.mu.tolist() == [[5, 6], [7, 8]]


def test_views_of_different_sizes_take_a_pass_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "share_a_batch", lambda _: True)
    sizes: list[int] = []

    class Counting(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            sizes.append(len(batch))
            return batch.flatten(1)[:, :1]

    crops = [torch.full((2, 3, side, side), side) for side in (8, 8, 4)]
    assert [view.tolist() for view in views.forward_views(Counting(), crops)] == [
        [[8], [8]],
        [[8], [8]],
        [[4], [4]],
    ]
    assert sizes == [4, 2]
