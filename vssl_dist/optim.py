"""Optimizers, and which parameters weight decay reaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vssl_dist.config import OptimConfig


def build_optimizer(cfg: OptimConfig, student: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the student's trainable parameters, at the peak learning rate.

    Its groups must exist before DeepSpeed sees it: ZeRO makes one flat vector of each group, in
    which a bias can no longer be told from a weight.

    Args:
        cfg: The ``optim`` block.
        student: The network to train.

    Raises:
        ValueError: There is no optimizer of that name here.
    """
    groups = parameter_groups(cfg, student)
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.peak_lr, momentum=cfg.momentum)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=cfg.betas)
    raise ValueError(f"optim.name={cfg.name} is not built: use sgd or adamw")


def parameter_groups(cfg: OptimConfig, student: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters, those that weight decay spares in a group of their own.

    Spared are biases and normalisation weights, which are exactly the parameters with at most
    one dimension; ``decay_norm_and_bias`` treats them like the others.  Empty groups are left
    out.

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
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
