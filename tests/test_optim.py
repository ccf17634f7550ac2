"""Optimizers hold what is trained, once, and decay what should be decayed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from vssl_dist.config import OptimConfig
from vssl_dist.methods.byol import BYOL, BYOLConfig
from vssl_dist.optim import apply_schedules, build_optimizer, parameter_groups

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


@pytest.mark.parametrize("clip", [False, True])
def test_lars_follows_its_formula_and_spares_biases_and_norms(clip: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    nn.init.zeros_(net[2].weight)  # a weight without a norm follows its gradient
    cfg = optim_config(name="lars", momentum=0.5, trust=0.01, trust_clip=clip)
    optimizer = build_optimizer(cfg, net)
    lr, parameters = 0.5 * 64 / 256, list(net.parameters())
    want = [p.detach().double().clone() for p in parameters]
    momentum = [torch.zeros_like(w) for w in want]
    for _ in range(3):
        for number, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            change = p.grad.double()
            if p.ndim > 1:
                change = change + 0.1 * want[number]
                norms = want[number].norm(), change.norm()
                rate = 0.01 * norms[0] / norms[1] if min(norms) > 0 else torch.tensor(1.0)
                change = change * (min(rate / lr, 1.0) if clip and min(norms) > 0 else rate)
            momentum[number] = 0.5 * momentum[number] + change
            want[number] = want[number] - lr * momentum[number]
        optimizer.step()
    for p, value in zip(parameters, want, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-7)


def test_lars_has_one_group_for_all_weights_and_the_rest_in_few() -> None:
    net = student()
    for everything in (False, True):
        cfg = optim_config(name="lars", decay_norm_and_bias=everything)
        groups = build_optimizer(cfg, net).param_groups
        (adapted,) = [group["params"] for group in groups if group["adapted"]]
        assert all(parameter.ndim > 1 for parameter in adapted)
        rest = [p for group in groups if not group["adapted"] for p in group["params"]]
        assert all(p.ndim <= 1 for p in rest)
        assert len(adapted) + len(rest) == len(list(net.parameters()))
        decays = {group["weight_decay"] for group in groups if not group["adapted"]}
        assert decays == ({0.1} if everything else {0.0})


def test_lars_goes_on_from_a_state_that_had_a_group_for_each_weight() -> None:
    nets = [student() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (build_optimizer(optim_config(name="lars"), net) for net in nets)
    _step_with_random_gradients(nets[0], first, seed=0)
    nets[1].load_state_dict(nets[0].state_dict())
    state = copy.deepcopy(first.state_dict())
    weights, *others = state["param_groups"]
    split = [weights | {"params": [number]} for number in weights["params"]]
    second.load_state_dict(state | {"param_groups": [*split, *others]})
    for net, optimizer in zip(nets, (first, second), strict=True):
        _step_with_random_gradients(net, optimizer, seed=1)
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, two)


def _step_with_random_gradients(
    net: nn.Module, optimizer: torch.optim.Optimizer, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_schedules_move_the_rate_and_the_decay_of_what_decays() -> None:
    cfg = optim_config(name="adamw", weight_decay_end=0.5, warmup_epochs=0.5)
    optimizer = build_optimizer(cfg, student())
    seen = [
        apply_schedules(optimizer, cfg, step, 10, steps_per_epoch=4.0) for step in (0, 1, 2, 5, 10)
    ]
    assert [round(rates["lr"] / cfg.peak_lr, 4) for rates in seen[:3]] == [0.0, 0.5, 1.0]
    decay = [round(rates["weight_decay"], 4) for rates in seen]
    assert decay == [0.1, 0.1098, 0.1382, 0.3, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    constant = optim_config(name="adamw")
    assert apply_schedules(optimizer, constant, 7, 10, 4.0)["weight_decay"] == 0.1
    still = optim_config(weight_decay=0.0, weight_decay_end=0.5)
    fresh = build_optimizer(still, student())
    apply_schedules(fresh, still, 10, 10, 4.0)
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.5, 0.0]
