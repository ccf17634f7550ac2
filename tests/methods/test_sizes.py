"""Views of a size of their own, in every method and with a backbone of a fixed size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.views import NoNoise, two_views
from vssl_dist.methods import CONFIGS, MicroStep, build_method

VIT = "vit_tiny_patch16_224"
HEADS: dict[str, dict[str, Any]] = {
    "vje": {"hidden": 16},
    "supervised": {"classes": 3},
    "dino": {"hidden": 16, "bottleneck": 8, "prototypes": 12, "local_crops": 0},
}


def small(name: str, backbone: str = VIT) -> Any:
    keys = HEADS.get(name, {"hidden": 16, "dim": 16})
    return CONFIGS[name].model_validate({"name": name, "backbone": backbone} | keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_vit_learns_from_views_that_are_not_the_size_of_the_images(name: str) -> None:
    """DINO's global crops are of one size, which need not be that of the images."""
    torch.manual_seed(0)
    cfg = small(name)
    sides = (16, 16) if name == "dino" else (32, 16)[2 - cfg.views_wanted :]
    method = build_method(cfg, 32, sides)
    views = [view[..., :side, :side] for view, side in zip(two_views(4), sides, strict=False)]
    out = method.loss(views, MicroStep(NoNoise(), 5.0, torch.arange(4) % 3))
    assert out.loss.isfinite()
    out.loss.backward()
    learns = [p.grad is not None for p in method.student.parameters() if p.requires_grad]
    assert all(learns)


def test_where_all_views_are_the_images_size_the_network_is_the_same() -> None:
    images, _ = two_views(3)
    features = []
    for sides in ((), (32, 32), (32, 16)):
        torch.manual_seed(0)
        backbone = build_method(small("simsiam"), 32, sides).student.get_submodule("backbone")
        features.append(backbone.eval()(images))
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
