"""Optimizers hold what is trained, once, and decay what should be decayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vssl_dist.config import OptimConfig
from vssl_dist.methods.byol import BYOL, BYOLConfig
from vssl_dist.optim import build_optimizer, parameter_groups

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


def optim_config(**options: Any) -> OptimConfig:
    return OptimConfig(**({"base_lr": 0.5, "weight_decay": 0.1, "global_batch": 64} | options))


def student() -> nn.Module:
    cfg = BYOLConfig(backbone="resnet18_c16", hidden=8, dim=4)
    return BYOL(cfg, image_size=32).student


def test_weights_are_decayed_and_biases_and_norms_are_not() -> None:
    net = student()
    decayed, spared = parameter_groups(optim_config(), net)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    want = {
        id(parameter)
        for module in net.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name == "bias"
    }
    assert {id(p) for p in spared["params"]} == want
    assert len(want) > 40
    every = [id(p) for group in (decayed, spared) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in net.parameters())


def test_decay_can_reach_everything() -> None:
    net = student()
    (group,) = parameter_groups(optim_config(decay_norm_and_bias=True), net)
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len(list(net.parameters()))


def test_what_is_frozen_is_left_out_and_groups_are_never_empty() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    (group,) = parameter_groups(optim_config(), net)
    assert [id(p) for p in group["params"]] == [id(net[1].weight)]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_is_the_textbooks(name: str) -> None:
    net = nn.Linear(3, 1, bias=False)
    cfg = optim_config(name=name, momentum=0.5, betas=(0.8, 0.9))
    optimizer = build_optimizer(cfg, net)
    lr = 0.5 * 64 / 256
    weight = net.weight.detach().double().clone()
    momentum, square = torch.zeros(1, 3).double(), torch.zeros(1, 3).double()
    for step in range(1, 4):
        gradient = torch.tensor([[1.0, -2.0, 0.5]]) * step
        net.weight.grad = gradient.clone()
        optimizer.step()
        if name == "sgd":
            momentum = 0.5 * momentum + gradient + 0.1 * weight
            weight = weight - lr * momentum
        else:
            momentum = 0.8 * momentum + 0.2 * gradient
            square = 0.9 * square + 0.1 * gradient**2
            mean, scale = momentum / (1 - 0.8**step), (square / (1 - 0.9**step)).sqrt()
            weight = weight - lr * 0.1 * weight - lr * mean / (scale + 1e-8)
    torch.testing.assert_close(net.weight.detach().double(), weight, rtol=1e-6, atol=1e-7)


def test_an_optimizer_that_is_not_built_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.name=lars is not built: use sgd or adamw"):
        build_optimizer(optim_config(name="lars"), nn.Linear(1, 1))
