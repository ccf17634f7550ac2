"""Many linear classifiers of the same features, trained at once by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vssl_dist.console.bars import progress_bar
from vssl_dist.evaluation.scores.probe import ProbeData, fit_scaling
from vssl_dist.models.linear_probe import Probe, Scaling

_MOMENTUM = 0.9
_TRUST = 0.001
Optimizer = Literal["sgd", "lars"]


def train_sgd_probes(
    data: ProbeData,
    lr: Sequence[float],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch: int,
    optimizer: Optimizer = "sgd",
) -> dict[tuple[int, float], Probe]:
    """Train a probe for every seed and learning rate at once: one batched product per step.

    Momentum 0.9 and no weight decay; the learning rate is ``lr * batch / 256`` at first and falls
    to 0 on half a cosine.  A seed decides the initial weights and the order.

    Args:
        data: Images and labels.
        lr: Peak learning rates per 256 images.
        seeds: One independent training each.
        epochs: Passes over the images.
        batch: Images per step.
        optimizer: SGD, or LARS (You et al., 2017), under which the gradient ``g`` of a weight
            matrix ``w``, though not that of biases, is scaled by ``0.001 |w| / |g|``.

    Returns:
        A float32 probe on the device for each ``(seed, lr)``; not finite where it diverged.
    """
    scaling = fit_scaling(data.features, data.rows)
    grid = _Grid.start(data, lr, seeds, len(scaling.mean))
    batch = min(batch, len(data.rows))
    rates = torch.tensor(lr, device=data.device).repeat_interleave(data.classes) * batch / 256
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    mean, std = (t.float().to(data.device) for t in scaling)
    steps_per_epoch = math.ceil(len(data.rows) / batch)
    with progress_bar() as progress:
        bar = progress.add_task(f"{optimizer.upper()} probes", total=epochs)
        for epoch in range(epochs):
            orders = torch.stack([torch.randperm(len(data.rows), generator=g) for g in generators])
            for step, positions in enumerate(torch.split(orders, batch, dim=1)):
                rows = data.rows[positions]
                x = data.features.features[rows].float().to(data.device)
                done = (epoch * steps_per_epoch + step) / (epochs * steps_per_epoch)
                grid.step(
                    (x - mean) / std,
                    data.features.labels[rows].to(data.device),
                    rates * 0.5 * (1 + math.cos(math.pi * done)),
                    optimizer,
                )
            progress.update(bar, completed=epoch + 1)
    return grid.probes(lr, seeds, scaling)


class _Grid:
    """Weights ``(S, D + 1, L * C)`` of S seeds and L learning rates, and their momentum.

    Biases are in the last row.  The probes of one seed stand side by side, because they see the
    same batches: one product serves all learning rates.
    """

    def __init__(self, table: Tensor, classes: int) -> None:
        self.table = table
        self.classes = classes
        self.velocity = torch.zeros_like(table)

    @classmethod
    def start(cls, data: ProbeData, lr: Sequence[float], seeds: Sequence[int], width: int) -> _Grid:
        """Draw small random weights, the same for every learning rate; biases are 0."""
        tables = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            weights = 0.01 * torch.randn(width, data.classes, generator=generator)
            tables.append(F.pad(weights, (0, 0, 0, 1)).repeat(1, len(lr)))
        return cls(torch.stack(tables).to(data.device), data.classes)

    def step(self, x: Tensor, labels: Tensor, rates: Tensor, optimizer: Optimizer) -> None:
        """Take a step on ``(S, B, D)`` and ``(S, B)`` with a rate ``(L * C,)`` per column."""
        logits = torch.bmm(x, self.table[:, :-1]) + self.table[:, -1:]
        seeds, rows, columns = logits.shape
        by_probe = logits.view(seeds, rows, columns // self.classes, self.classes)
        target = F.one_hot(labels, self.classes)[:, :, None]
        # The gradient of the mean cross-entropy with respect to the logits.
        residual = ((by_probe.softmax(-1) - target) / rows).view_as(logits)
        self.velocity *= _MOMENTUM
        if optimizer == "sgd":
            self.velocity[:, :-1].baddbmm_(x.transpose(1, 2), residual)
        else:
            self.velocity[:, :-1] += self._lars_update(torch.bmm(x.transpose(1, 2), residual))
        self.velocity[:, -1] += residual.sum(1)
        self.table -= rates * self.velocity

    def _lars_update(self, gradient: Tensor) -> Tensor:
        """Scale the weights' gradient ``(S, D, L * C)`` as LARS does, each probe by itself."""
        shape = (*gradient.shape[:2], -1, self.classes)
        weight_norm = torch.linalg.vector_norm(self.table[:, :-1].view(shape), dim=(1, 3))
        gradient_norm = torch.linalg.vector_norm(gradient.view(shape), dim=(1, 3))
        is_defined = (weight_norm > 0) & (gradient_norm > 0)
        rate = torch.where(is_defined, _TRUST * weight_norm / gradient_norm, 1.0)
        return gradient * rate.repeat_interleave(self.classes, dim=1)[:, None]

    def probes(
        self, lr: Sequence[float], seeds: Sequence[int], scaling: Scaling
    ) -> dict[tuple[int, float], Probe]:
        """Return the probes of raw features as they are now, by seed and learning rate."""
        scaling = Scaling(*(t.float().to(self.table.device) for t in scaling))
        probes = {}
        for seed, seed_table in zip(seeds, self.table, strict=True):
            for rate, table in zip(lr, torch.split(seed_table, self.classes, dim=1), strict=True):
                probes[seed, rate] = Probe.of_scaled(table[:-1], table[-1], scaling)
        return probes
