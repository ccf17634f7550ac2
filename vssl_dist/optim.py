"""Optimizers, which parameters weight decay reaches, and what changes from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vssl_dist import dist, schedule

if TYPE_CHECKING:  # all else here needs torch alone
    from vssl_dist.config import OptimConfig


def build_optimizer(
    cfg: OptimConfig, student: nn.Module, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of the student's trainable parameters, at the peak learning rate.

    Its groups must exist before DeepSpeed sees it: ZeRO makes one flat vector of each group, in
    which a bias can no longer be told from a weight.

    Args:
        cfg: The ``optim`` block.
        student: The network to train.
        sharded: Whether ZeRO will cut the groups into shards, one per rank.
    """
    groups = parameter_groups(cfg, student)
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.peak_lr, momentum=cfg.momentum)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=cfg.betas)
    return LARS(_one_weight_per_group(groups), cfg, sharded)


def parameter_groups(cfg: OptimConfig, student: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters, those that weight decay spares in a group of their own.

    Spared are biases and normalisation weights, which are exactly the parameters with at most
    one dimension; ``decay_norm_and_bias`` treats them like the others.  Empty groups are left
    out.

    >>> from vssl_dist.config import OptimConfig
    >>> cfg = OptimConfig(base_lr=0.1, weight_decay=0.5)
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> [(g["weight_decay"], len(g["params"])) for g in parameter_groups(cfg, net)]
    [(0.5, 1), (0.0, 3)]
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in student.parameters():
        if parameter.requires_grad:
            spare = parameter.ndim <= 1 and not cfg.decay_norm_and_bias
            (spared if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay, "decays": True},
        {"params": spared, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def apply_schedules(
    optimizer: torch.optim.Optimizer,
    cfg: OptimConfig,
    step: int,
    total: int,
    steps_per_epoch: float,
) -> dict[str, float]:
    """Set what the schedules say for this step; returns ``lr`` and ``weight_decay``.

    Args:
        optimizer: One of `build_optimizer`.
        cfg: The ``optim`` block.
        step, total: Optimizer steps done, and of the whole run.
        steps_per_epoch: Optimizer steps per epoch: the measure of the warm-up.
    """
    warmup = round(cfg.warmup_epochs * steps_per_epoch)
    lr = schedule.warmup_cosine(step, total, warmup, cfg.peak_lr)
    end = cfg.weight_decay if cfg.weight_decay_end is None else cfg.weight_decay_end
    weight_decay = schedule.cosine(step, total, cfg.weight_decay, end)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return {"lr": lr, "weight_decay": weight_decay}


def norms_by_part(
    student: nn.Module, gradient_of: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, Tensor]:
    """Norms of the gradient of ``backbone`` and of all the rest, the ``head``.

    Args:
        student: The network.
        gradient_of: A parameter's whole gradient, None where it has none.

    Returns:
        ``grad_norm_backbone`` and ``grad_norm_head``, infinite where they are not finite; a part
        without a gradient is left out.

    >>> student = nn.ModuleDict({"backbone": nn.Linear(2, 1), "posterior": nn.Linear(1, 1)})
    >>> norms = norms_by_part(student, torch.ones_like)
    >>> [round(norm.item() ** 2) for norm in norms.values()]
    [3, 2]
    """
    norms: dict[str, list[Tensor]] = {"backbone": [], "head": []}
    for name, parameter in student.named_parameters():
        gradient = gradient_of(parameter) if parameter.requires_grad else None
        if gradient is not None:
            branch = "backbone" if name.startswith("backbone.") else "head"
            norms[branch].append(torch.linalg.vector_norm(gradient))
    totals = {branch: torch.stack(values).norm() for branch, values in norms.items() if values}
    return {
        f"grad_norm_{branch}": torch.where(norm.isfinite(), norm, torch.inf)
        for branch, norm in totals.items()
    }


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017, arXiv 1708.03888), exact under ZeRO.

    With ``d = gradient + weight_decay * w``, an adapted parameter follows ``trust |w| / |d| * d``
    and any other ``d`` itself, both with momentum.  Biases and normalisation weights are not
    adapted, as in the code of SimCLR, BYOL, Barlow Twins and MoCo v3.

    ZeRO hands the optimizer one rank's cut of a flat vector per group.  So an adapted group holds
    one parameter: its norms are those of the group, whose squares are summed over the ranks.

    Args:
        groups: Parameter groups from `_one_weight_per_group`.
        cfg: The ``optim`` block.
        sharded: Whether a rank's tensors are cuts; otherwise every rank has the whole.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], cfg: OptimConfig, sharded: bool) -> None:
        super().__init__(groups, {"lr": cfg.peak_lr})
        self.momentum = cfg.momentum
        self.trust = cfg.trust
        self.trust_clip = cfg.trust_clip
        self.sharded = sharded

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not supported."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad.add(weight, alpha=group["weight_decay"])
                if group["adapted"]:
                    update *= self._rate(weight, update, group["lr"])
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].mul_(self.momentum).add_(update)
                weight.add_(state["momentum"], alpha=-group["lr"])

    def _rate(self, weight: Tensor, update: Tensor, lr: float) -> Tensor:
        """``trust |w| / |d|`` over all ranks' shards; 1 where either norm is zero."""
        squares = torch.stack([weight.square().sum(), update.square().sum()])
        if self.sharded:
            # A cut holds a part of the weight: squares add up over ranks, norms would not.
            squares = dist.all_reduce(squares)
        weight_norm, update_norm = squares.sqrt().unbind()
        rate = self.trust * weight_norm / update_norm
        if self.trust_clip:
            rate = (rate / lr if lr else torch.full_like(rate, torch.inf)).clamp(max=1.0)
        return torch.where((weight_norm > 0) & (update_norm > 0), rate, 1.0)


def _one_weight_per_group(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put each weight (two dimensions or more) into an adapted group of its own."""
    split: list[dict[str, Any]] = []
    for group in groups:
        weights = [p for p in group["params"] if p.ndim > 1]
        others = [p for p in group["params"] if p.ndim <= 1]
        split += [group | {"params": [weight], "adapted": True} for weight in weights]
        split += [group | {"params": others, "adapted": False}] if others else []
    return split
