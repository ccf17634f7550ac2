"""Many linear classifiers of the same features, trained at once by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vssl_dist.console.bars import progress_bar
from vssl_dist.evaluation.scores.probe import Training, scaling
from vssl_dist.models.linear_probe import Probe, Scaling

_MOMENTUM, _TRUST = 0.9, 0.001
Optimizer = Literal["sgd", "lars"]


def descend(
    data: Training,
    lr: Sequence[float],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch: int,
    optimizer: Optimizer = "sgd",
) -> dict[tuple[int, float], Probe]:
    """Probes for every seed and learning rate, trained at once: one batched product per step.

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
    scale = scaling(data.features, data.rows)
    grid = _Grid.start(data, lr, seeds, len(scale.mean))
    batch = min(batch, len(data.rows))
    rates = torch.tensor(lr, device=data.device).repeat_interleave(data.classes) * batch / 256
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    mean, std = (t.float().to(data.device) for t in scale)
    per_epoch = math.ceil(len(data.rows) / batch)
    with progress_bar() as shown:
        task = shown.add_task(f"{optimizer.upper()} probes", total=epochs)
        for epoch in range(epochs):
            orders = torch.stack([torch.randperm(len(data.rows), generator=g) for g in generators])
            for step, places in enumerate(torch.split(orders, batch, dim=1)):
                rows = data.rows[places]
                x = data.features.features[rows].float().to(data.device)
                done = (epoch * per_epoch + step) / (epochs * per_epoch)
                grid.step(
                    (x - mean) / std,
                    data.features.labels[rows].to(data.device),
                    rates * 0.5 * (1 + math.cos(math.pi * done)),
                    optimizer,
                )
            shown.update(task, completed=epoch + 1)
    return grid.probes(lr, seeds, scale)


class _Grid:
    """Weights ``(S, D + 1, L * C)``, biases in the last row, and their momentum."""

    def __init__(self, table: Tensor, classes: int) -> None:
        self.table, self.classes = table, classes
        self.velocity = torch.zeros_like(table)

    @classmethod
    def start(cls, data: Training, lr: Sequence[float], seeds: Sequence[int], width: int) -> _Grid:
        """Small random weights, the same for every learning rate; biases 0."""
        tables = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            weights = 0.01 * torch.randn(width, data.classes, generator=generator)
            tables.append(F.pad(weights, (0, 0, 0, 1)).repeat(1, len(lr)))
        return cls(torch.stack(tables).to(data.device), data.classes)

    def step(self, x: Tensor, labels: Tensor, rates: Tensor, optimizer: Optimizer) -> None:
        """One step on ``(S, B, D)`` and ``(S, B)`` with a rate ``(L * C,)`` per column."""
        logits = torch.bmm(x, self.table[:, :-1]) + self.table[:, -1:]
        seeds, rows, columns = logits.shape
        split = logits.view(seeds, rows, columns // self.classes, self.classes)
        target = F.one_hot(labels, self.classes)[:, :, None]
        residual = ((split.softmax(-1) - target) / rows).view_as(logits)
        self.velocity *= _MOMENTUM
        if optimizer == "sgd":
            self.velocity[:, :-1].baddbmm_(x.transpose(1, 2), residual)
        else:
            self.velocity[:, :-1] += self._adapted(torch.bmm(x.transpose(1, 2), residual))
        self.velocity[:, -1] += residual.sum(1)
        self.table -= rates * self.velocity

    def _adapted(self, gradient: Tensor) -> Tensor:
        """LARS' update from the gradient ``(S, D, L * C)`` of the weights, each probe by itself."""
        shape = (*gradient.shape[:2], -1, self.classes)
        of_weight = torch.linalg.vector_norm(self.table[:, :-1].view(shape), dim=(1, 3))
        of_gradient = torch.linalg.vector_norm(gradient.view(shape), dim=(1, 3))
        moves = (of_weight > 0) & (of_gradient > 0)
        rate = torch.where(moves, _TRUST * of_weight / of_gradient, 1.0)
        return gradient * rate.repeat_interleave(self.classes, dim=1)[:, None]

    def probes(
        self, lr: Sequence[float], seeds: Sequence[int], scale: Scaling
    ) -> dict[tuple[int, float], Probe]:
        """The probes as they are now."""
        scale = Scaling(*(t.float().to(self.table.device) for t in scale))
        found = {}
        for seed, table in zip(seeds, self.table, strict=True):
            for rate, one in zip(lr, torch.split(table, self.classes, dim=1), strict=True):
                found[seed, rate] = Probe.of_scaled(one[:-1], one[-1], scale)
        return found
