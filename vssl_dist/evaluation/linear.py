"""Linear classification of frozen features: SGD over a grid, and logistic regression.

Features are computed once, without augmentation, and scaled by the mean and standard deviation of
the images that are trained on.  Learning rate and regularisation are chosen on images held out of
the training set, never on those that the accuracy is reported of; then all training images are
used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from vssl_dist.evaluation.features import bar
from vssl_dist.evaluation.knn import Features
from vssl_dist.evaluation.probe import (
    Probe,
    Scaling,
    accuracy,
    adjacent,
    blocks,
    scaling,
    split,
)

_MOMENTUM = 0.9
_MOST_ITERATIONS = 500
_COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Training:
    """What probes are trained on."""

    features: Features
    rows: Tensor
    """Row numbers, sorted."""
    classes: int
    device: str = "cpu"

    def only(self, rows: Tensor) -> Training:
        """The same with other rows."""
        return Training(self.features, rows, self.classes, self.device)

    def together(self) -> Training:
        """The same with its rows copied to where they follow one another, if they are small.

        Many passes over scattered rows cost more in copies than in products.
        """
        size = 4 * len(self.rows) * self.features.features.shape[1]
        if adjacent(self.rows) or size > _COPIED_BYTES:
            return self
        parts = zip(*blocks(self.features, self.rows), strict=True)
        copied = Features(*(torch.cat(part) for part in parts))
        return Training(copied, torch.arange(len(self.rows)), self.classes, self.device)


def logistic(data: Training, l2: Sequence[float], *, tolerance: float = 1e-5) -> dict[float, Probe]:
    """Multinomial logistic regression: minimises mean cross-entropy + ``l2 / 2 * |weights|^2``.

    Weights are those of scaled features; biases are not penalised.  scikit-learn's ``C`` is
    ``1 / (l2 * rows)``.  L-BFGS starts from the next larger ``l2``'s solution; features are read
    a block at a time.

    Args:
        data: Images and labels.
        l2: Weights of the penalty.
        tolerance: Largest entry of the gradient at the end, if rounding allows.

    Returns:
        A float64 probe on the CPU for each ``l2``.
    """
    data = data.together()
    scale = scaling(data.features, data.rows)
    width = len(scale.mean)
    flat: NDArray[np.float64] = np.zeros((width + 1) * data.classes)
    probes = {}
    with bar() as shown:
        task = shown.add_task("logistic regression", total=len(l2))
        for weight in sorted(l2, reverse=True):
            found = minimize(
                lambda point, weight=weight: _loss(point, data, scale, weight),
                flat,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": _MOST_ITERATIONS, "gtol": tolerance, "ftol": 1e-12},
            )
            flat = found.x
            table = torch.from_numpy(flat.reshape(width + 1, data.classes).copy())
            probes[weight] = Probe.of_scaled(table[:-1], table[-1], scale)
            shown.update(task, advance=1)
    return {weight: probes[weight] for weight in l2}


def _loss(
    point: NDArray[np.float64], data: Training, scale: Scaling, l2: float
) -> tuple[float, NDArray[np.float64]]:
    """The objective and its gradient at a table ``(D + 1, C)`` of weights and biases."""
    table = torch.from_numpy(point.reshape(-1, data.classes))
    probe = Probe.of_scaled(table[:-1], table[-1], scale)
    loss, gradient = 0.0, torch.zeros_like(table)
    for x, labels in blocks(data.features, data.rows):
        x, labels = x.to(data.device), labels.to(data.device)
        logits = x @ probe.weight.to(x) + probe.bias.to(x)
        log_p = logits.double().log_softmax(1)
        loss -= float(log_p.gather(1, labels[:, None]).sum())
        residual = log_p.exp() - F.one_hot(labels, data.classes)
        gradient[:-1] += (x.T @ residual.to(x)).double().cpu()
        gradient[-1] += residual.sum(0).cpu()
    # What the raw features give, as the gradient with respect to scaled ones.
    gradient[:-1] = (gradient[:-1] - scale.mean[:, None] * gradient[-1]) / scale.std[:, None]
    gradient /= len(data.rows)
    gradient[:-1] += l2 * table[:-1]
    penalty = 0.5 * l2 * float(table[:-1].square().sum())
    return loss / len(data.rows) + penalty, gradient.numpy().ravel()


def sgd(
    data: Training, lr: Sequence[float], seeds: Sequence[int], *, epochs: int, batch: int
) -> dict[tuple[int, float], Probe]:
    """Probes for every seed and learning rate, trained at once: one batched product per step.

    SGD with momentum 0.9 and no weight decay; the learning rate is ``lr * batch / 256`` at first
    and falls to 0 on half a cosine.  A seed decides the initial weights and the order.

    Args:
        data: Images and labels.
        lr: Peak learning rates per 256 images.
        seeds: One independent training each.
        epochs: Passes over the images.
        batch: Images per step.

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
    with bar() as shown:
        task = shown.add_task("SGD probes", total=epochs)
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

    def step(self, x: Tensor, labels: Tensor, rates: Tensor) -> None:
        """One step on ``(S, B, D)`` and ``(S, B)`` with a rate ``(L * C,)`` per column."""
        logits = torch.bmm(x, self.table[:, :-1]) + self.table[:, -1:]
        seeds, rows, columns = logits.shape
        split = logits.view(seeds, rows, columns // self.classes, self.classes)
        target = F.one_hot(labels, self.classes)[:, :, None]
        residual = ((split.softmax(-1) - target) / rows).view_as(logits)
        self.velocity *= _MOMENTUM
        self.velocity[:, :-1].baddbmm_(x.transpose(1, 2), residual)
        self.velocity[:, -1] += residual.sum(1)
        self.table -= rates * self.velocity

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


def best_l2(data: Training, l2: Sequence[float], held_out: float, seed: int) -> dict[str, Any]:
    """Choose among ``l2`` on held-out training images.

    Returns:
        ``l2``, ``held_out`` (accuracy of each on how many ``held_out_images``); the middle one
        where no image can be held out.  Of equal ones the larger wins.
    """
    fit, check = split(data.features.labels, data.rows, held_out, seed)
    if not len(check) or len(l2) == 1:
        return {"l2": sorted(l2)[len(l2) // 2], "held_out": {}, "held_out_images": 0}
    probes = logistic(data.only(fit), l2, tolerance=1e-4)
    found = {weight: accuracy(probe, data.features, check).top1 for weight, probe in probes.items()}
    best = max(found, key=lambda weight: (found[weight], weight))
    shown = {f"{weight:g}": value for weight, value in found.items()}
    return {"l2": best, "held_out": shown, "held_out_images": len(check)}


def best_lr(
    data: Training, lr: Sequence[float], held_out: float, *, epochs: int, batch: int
) -> dict[str, Any]:
    """Choose among learning rates on held-out training images; see `best_l2`.

    Of equal ones the smaller wins.
    """
    fit, check = split(data.features.labels, data.rows, held_out, seed=0)
    if not len(check) or len(lr) == 1:
        return {"lr": sorted(lr)[len(lr) // 2], "held_out": {}, "held_out_images": 0}
    probes = sgd(data.only(fit), lr, [0], epochs=epochs, batch=batch)
    found = {rate: accuracy(probes[0, rate], data.features, check).top1 for rate in lr}
    best = max(found, key=lambda rate: (found[rate], -rate))
    shown = {f"{rate:g}": value for rate, value in found.items()}
    return {"lr": best, "held_out": shown, "held_out_images": len(check)}
